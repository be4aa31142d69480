"""The real engine counts a prompt as it would answer it, and gives an answer what its context leaves."""

import itertools

import pytest

from serve.engine.protocol import (
    Accepted,
    Event,
    Finished,
    GenerationRequest,
    Message,
    Sampling,
    Texts,
    Tool,
    Toolbox,
)
from serve.engine.protocol import Prompt as EnginePrompt
from serve.errors import ContextLengthExceeded
from tests.support.engine_host import SETTINGS, EngineHost

pytestmark = pytest.mark.slow

CONTEXT = SETTINGS.max_model_len
WEATHER = Tool("weather", "The weather.", '{"type":"object","properties":{"city":{"type":"string"}}}')
_numbers = itertools.count()
HELLO = (Message("system", "Be brief."), Message("user", "Hello"))


def run(host: EngineHost, prompt: EnginePrompt, asked: int | None = 1, **fields: object) -> list[Event]:
    events: list[Event] = []
    sampling = Sampling(completion_tokens_max=asked, temperature=0.0, logit_bias=((2, 100.0),))
    request = GenerationRequest(f"prompt-{next(_numbers)}", None, prompt, sampling, "salt", **fields)  # type: ignore[arg-type]
    host.run(host.engine.generate(request, events.extend))
    return events


def accepted(events: list[Event]) -> Accepted:
    (event,) = (event for event in events if isinstance(event, Accepted))
    return event


@pytest.mark.parametrize("toolbox", [None, Toolbox((WEATHER,)), Toolbox((WEATHER,), "none")])
def test_a_count_is_what_the_same_request_is_accepted_with(host: EngineHost, toolbox: Toolbox | None) -> None:
    before = host.counters()
    counted = run(host, HELLO, toolbox=toolbox, count_only=True)
    after = host.counters()
    answered = run(host, HELLO, toolbox=toolbox)
    tokens = accepted(answered).prompt_tokens
    assert counted[-1] == Finished(tokens, 0, 0, aborted=False)
    assert (after.prompt_tokens, after.completion_tokens) == (before.prompt_tokens, before.completion_tokens)


def test_a_prompt_that_the_context_cannot_hold_is_refused_and_still_counted(host: EngineHost) -> None:
    long = (Message("user", "rain " * 3 * CONTEXT),)
    assert accepted(run(host, long, count_only=True)).prompt_tokens > CONTEXT
    with pytest.raises(ContextLengthExceeded) as refused:
        run(host, long)
    assert refused.value.param == "messages"


def test_an_answer_may_have_what_the_prompt_leaves_of_the_context(host: EngineHost) -> None:
    for length in (1, 100, CONTEXT - 2, CONTEXT - 1):
        prompt = Texts(((5,) * length,))
        for asked in (1, CONTEXT, 10 * CONTEXT):
            assert accepted(run(host, prompt, asked)).completion_tokens_max == min(asked, CONTEXT - length)
    two = Texts(((5,) * 10, (6,) * 30))
    assert accepted(run(host, two, CONTEXT)).completion_tokens_max == CONTEXT - 30
    assert accepted(run(host, two, CONTEXT, context_tokens_max=50)).completion_tokens_max == 20
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(ContextLengthExceeded) as refused:
            run(host, Texts(((5,) * length,)))
        assert (refused.value.param, refused.value.completion_tokens) == ("prompt", 1)
