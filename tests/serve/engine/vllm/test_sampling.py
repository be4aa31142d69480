"""Answers end and look as vLLM's own fields ask, and an empty completion counts its prompt alone."""

import itertools
import re
from typing import Any

import pytest

from serve.engine.protocol import Delta, Event, Finished, GenerationRequest, Sampling, TextFormat, Texts
from serve.errors import InvalidRequest
from tests.support.engine_host import EngineHost, events_of

END = 2  # the tiny model's end of an answer
_numbers = itertools.count()


def ask(
    host: EngineHost, sampling: Sampling, *prompts: str, collect: bool = True
) -> tuple[str, str | None, Finished]:
    """The text and the finish reason of the first choice, and the counts."""
    number = f"sampling-{next(_numbers)}"
    request = GenerationRequest(
        number, None, Texts(prompts or ("Rain on",)), sampling, number, collect=collect
    )

    async def events() -> list[Event]:
        return [event async for batch in events_of(host.engine, request) for event in batch]

    *answer, finished = host.run(events())
    deltas = [event for event in answer if isinstance(event, Delta) and event.index == 0]
    assert isinstance(finished, Finished)
    reasons = [delta.finish_reason for delta in deltas if delta.finish_reason]
    return "".join(delta.text for delta in deltas), reasons[-1] if reasons else None, finished


@pytest.mark.parametrize("collect", [True, False])
@pytest.mark.parametrize("prompts", [("Rain on",), ("Rain on", "Snow")])
def test_an_empty_completion_counts_its_prompt_and_drifts_from_no_counter(
    host: EngineHost, prompts: tuple[str, ...], collect: bool
) -> None:
    before = host.counters()
    text, reason, finished = ask(host, Sampling(0), *prompts, collect=collect)
    assert (text, reason, finished.completion_tokens) == ("", "length", 0)
    echoed, reason, _ = ask(host, Sampling(0, echo=True, logprobs=1), *prompts, collect=collect)
    assert (echoed, reason) == (prompts[0], "length")
    after = host.counters()
    assert after.prompt_tokens - before.prompt_tokens == 2 * finished.prompt_tokens
    generated = after.completion_tokens - before.completion_tokens
    assert after.probe_completion_tokens - before.probe_completion_tokens == generated


def test_an_answer_does_not_end_before_its_least_length_or_at_all(host: EngineHost) -> None:
    ending: dict[str, Any] = {"temperature": 0.0, "logit_bias": ((END, 100.0),)}
    assert ask(host, Sampling(6, **ending))[1:][1].completion_tokens == 1
    _, reason, finished = ask(host, Sampling(6, **ending, completion_tokens_min=3))
    assert (reason, finished.completion_tokens) == ("stop", 4)
    text, reason, finished = ask(host, Sampling(6, **ending, ignore_eos=True, logprobs=0))
    assert (text, reason, finished.completion_tokens) == ("", "length", 6)


def test_an_answer_ends_at_a_token_that_the_client_names(host: EngineHost) -> None:
    biased: dict[str, Any] = {"temperature": 0.0, "logit_bias": ((100, 100.0),)}
    _, reason, finished = ask(host, Sampling(6, **biased, stop_token_ids=(100,)))
    assert (reason, finished.completion_tokens) == ("stop", 1)
    with pytest.raises(InvalidRequest) as wrong:
        ask(host, Sampling(6, stop_token_ids=(10**8,)))
    assert wrong.value.param == "stop_token_ids"


@pytest.mark.parametrize(
    "form",
    [
        TextFormat(regex="[0-9]{2}-(yes|no)"),
        TextFormat(regex=r"(café|\d+) 漢?"),
        TextFormat(choices=("yes", "no")),
        TextFormat(choices=('say "hi"', "back\\slash", "two\nlines", "😀", "]|[")),
    ],
)
def test_an_answer_is_what_it_must_be(host: EngineHost, form: TextFormat) -> None:
    for seed in range(3):
        text, reason, _ = ask(host, Sampling(40, seed=seed, text_format=form))
        assert reason == "stop"
        assert re.fullmatch(form.regex, text) if form.regex else text in form.choices


@pytest.mark.parametrize("regex", ["(", "[a-", "a**?{", "(?P<x"])
def test_a_pattern_that_gives_no_grammar_is_refused_by_name(host: EngineHost, regex: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        ask(host, Sampling(5, text_format=TextFormat(regex=regex, param="guided_regex")))
    assert wrong.value.param == "guided_regex"
    assert "/" not in wrong.value.message.replace(regex, "")
