"""Log-probabilities are those of another implementation on the same weights, the likeliest first."""

import itertools
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch

from serve.engine.protocol import Delta, Event, GenerationRequest, Sampling, Texts, TokenLogprob
from serve.engine.transport.frames import Frame, frames
from serve.formats.logprobs import text_logprobs
from tests.support.engine_host import EngineHost, events_of

TOLERANCE = 2e-3  # float32, summed in another order
PROMPTS = ["Rain on the roof", "café 漢字 😀 and", "One, two, three"]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def reference(host: EngineHost) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(host.base_dir, dtype=torch.float32)


def ask(host: EngineHost, prompt: str | tuple[Any, ...], sampling: Sampling, *, collect: bool) -> list[Delta]:
    """The answer to a text, to token ids, or to several texts."""
    number = f"logprobs-{next(_numbers)}"
    several = isinstance(prompt, tuple) and isinstance(prompt[0], str)
    texts = Texts(prompt if isinstance(prompt, tuple) and several else (prompt,))
    request = GenerationRequest(number, None, texts, sampling, number, collect=collect)

    async def batches() -> list[list[Event]]:
        return [batch async for batch in events_of(host.engine, request)]

    # As a gateway gets them.
    frame = msgspec.msgpack.encode(Frame([(number, batch) for batch in host.run(batches())]))
    events = [event for _, batch in frames.decode(frame).entries for event in batch]
    return [event for event in events if isinstance(event, Delta)]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def told(deltas: list[Delta]) -> list[TokenLogprob]:
    return [token for delta in deltas for token in delta.logprobs]


def joined(tokens: list[TokenLogprob]) -> str:
    return b"".join(token.token for token in tokens).decode(errors="replace")


class Expected:
    """Scores texts by transformers."""

    def __init__(self, host: EngineHost, model: Any) -> None:
        self._model = model
        self.tokenizer = host.engine._renderer.tokenizer
        self._vocabulary = host.engine._renderer.vocabulary
        self._numbers = {self.name(number): number for number in range(len(self.tokenizer))}

    def name(self, number: int) -> bytes:
        return self._vocabulary.token(number)

    def ids(self, tokens: list[TokenLogprob]) -> list[int]:
        return [self._numbers[token.token] for token in tokens]

    def scores(self, ids: list[int]) -> torch.Tensor:
        """The log-probabilities of all tokens after each of `ids`."""
        with torch.no_grad():
            return torch.log_softmax(self._model(torch.tensor([ids])).logits[0].double(), -1)

    def check(self, token: TokenLogprob, scores: torch.Tensor, likeliest: int) -> None:
        assert token.logprob == pytest.approx(float(scores[self._numbers[token.token]]), abs=TOLERANCE)
        best = torch.topk(scores, likeliest).values.tolist()
        assert [logprob for _, logprob in token.top] == pytest.approx(best, abs=TOLERANCE)
        for name, logprob in token.top:
            assert logprob == pytest.approx(float(scores[self._numbers[name]]), abs=TOLERANCE)


@pytest.fixture(scope="module")
def expected(host: EngineHost, reference: Any) -> Expected:
    return Expected(host, reference)


def test_every_token_is_bytes_that_a_frame_can_carry(expected: Expected) -> None:
    """xgrammar's own type for long ones is a subclass of bytes, and equal to them."""
    names = [expected.name(number) for number in range(len(expected.tokenizer))]
    assert {type(name) for name in names} == {bytes}
    assert max(map(len, names)) > 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("likeliest", [0, 1, 4])
def test_the_likeliest_tokens_are_told_whichever_was_drawn(
    host: EngineHost, expected: Expected, temperature: float, likeliest: int
) -> None:
    drawn_others = 0
    for seed, prompt in enumerate(PROMPTS):
        sampling = Sampling(12, temperature, seed=seed, logprobs=likeliest)
        whole, streamed = (ask(host, prompt, sampling, collect=collect) for collect in (True, False))
        assert (text_of(whole), told(whole)) == (text_of(streamed), told(streamed))
        tokens, prompt_ids = told(whole), expected.tokenizer.encode(prompt)
        scores = expected.scores(prompt_ids + expected.ids(tokens))
        for token, row in zip(tokens, scores[len(prompt_ids) - 1 :], strict=False):
            expected.check(token, row, likeliest)
            drawn_others += likeliest > 0 and token.token not in [name for name, _ in token.top]
    assert (drawn_others > 0) == (temperature > 0 and likeliest > 0)


@pytest.mark.parametrize("likeliest", [0, 1, 4])
def test_an_echoed_prompt_is_scored_token_by_token(
    host: EngineHost, expected: Expected, likeliest: int
) -> None:
    for prompt in PROMPTS:
        (delta,) = ask(host, prompt, Sampling(1, 0.0, logprobs=likeliest, echo=True), collect=True)
        ids = expected.tokenizer.encode(prompt)
        tokens = list(delta.logprobs)
        assert [token.token for token in tokens[:-1]] == [expected.name(number) for number in ids]
        assert joined(tokens[:-1]) == prompt
        assert (tokens[0].logprob, tokens[0].top) == (None, ())
        for token, row in zip(tokens[1:], expected.scores(ids), strict=True):
            expected.check(token, row, likeliest)


def test_the_tokens_told_are_the_text_with_and_without_stop_sequences(host: EngineHost) -> None:
    base = Sampling(16, 1.0, logprobs=1)
    for seed, prompt in enumerate(PROMPTS * 2):
        sampling = replace(base, seed=seed)
        text = text_of(ask(host, prompt, sampling, collect=True))
        stops: list[tuple[str, ...]] = [()]
        stops += [(text[at : at + size],) for at, size in ((1, 1), (4, 3), (7, 2)) if text[at : at + size]]
        stops.append((text[2:4] + "never", text[5:9]))
        for stop in stops:
            for collect in (True, False):
                deltas = ask(host, prompt, replace(sampling, stop=stop), collect=collect)
                assert joined(told(deltas)) == text_of(deltas)
                if stop:
                    assert len(text_of(deltas)) < len(text)


@pytest.mark.parametrize("collect", [True, False])
def test_each_choice_begins_with_its_prompt(host: EngineHost, collect: bool) -> None:
    sampling = Sampling(2, 1.0, n=2, seed=3, echo=True, logprobs=1)
    deltas = ask(host, ("Once upon a time", "Two"), sampling, collect=collect)
    for index, prompt in enumerate(["Once upon a time"] * 2 + ["Two"] * 2):
        choice = [delta for delta in deltas if delta.index == index]
        assert text_of(choice).startswith(prompt)
        assert joined(told(choice)) == text_of(choice)
        assert [token.logprob for token in told(choice)].index(None) == 0


def test_a_special_token_is_not_told_but_where_a_prompt_is_scored(host: EngineHost) -> None:
    """lm-eval counts from the end: the last token is the generated one, also if it ends the text."""
    end = Sampling(5, 0.0, logprobs=1, logit_bias=((2, 100.0),))
    for collect in (True, False):
        deltas = ask(host, "Rain", end, collect=collect)
        assert (text_of(deltas), told(deltas), deltas[-1].finish_reason) == ("", [], "stop")
    scored = ask(host, "Rain", replace(end, completion_tokens_max=1, echo=True), collect=True)
    assert (text_of(scored), told(scored)[-1].token) == ("Rain", b"<|im_end|>")


def harness_score(logprobs: dict[str, Any], context_tokens: int) -> tuple[float, bool]:
    """Scores a continuation as evaluation harnesses read a completion: the last token is not the prompt's."""
    scored = slice(context_tokens, len(logprobs["token_logprobs"]) - 1)
    values = logprobs["token_logprobs"][scored]
    likeliest = [max(top.values()) for top in logprobs["top_logprobs"][scored]]
    return sum(values), values == likeliest


def test_a_harness_finds_greedy_what_is_greedy(host: EngineHost, expected: Expected) -> None:
    score = Sampling(1, 0.0, logprobs=1, echo=True)
    for prompt in PROMPTS:
        ids = expected.tokenizer.encode(prompt)
        greedy = expected.ids(told(ask(host, tuple(ids), Sampling(4, 0.0, logprobs=1), collect=True)))
        assert greedy
        other = [*greedy[:-1], (greedy[-1] + 1) % 40_000 + 20]
        for continuation, is_greedy in ((greedy, True), (other, False)):
            (delta,) = ask(host, (*ids, *continuation), score, collect=True)
            result = harness_score(text_logprobs(delta.logprobs, 0, 1), len(ids))
            scores = expected.scores([*ids, *continuation])[len(ids) - 1 :]
            total = sum(float(row[number]) for row, number in zip(scores, continuation, strict=False))
            assert result == (pytest.approx(total, abs=TOLERANCE * 4), is_greedy)
