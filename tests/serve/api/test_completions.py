"""Text completions: the shape of log-probabilities, and completions that are to be empty."""

from pathlib import Path
from typing import Any

import pytest

from serve.api.schemas import TextCompletion
from serve.engine.protocol import Accepted, Delta, Finished, TokenLogprob
from tests.support.scripted_app import ScriptedApp

PATH = "/v1/completions"
SAY = {"model": "tiny", "prompt": "Say"}
Json = dict[str, Any]
# The likeliest token was not drawn; two tokens are one character.
TOKENS = (
    TokenLogprob(b"Say", None),
    TokenLogprob(b" \xf0\x9f", -2.5, ((b" a", -0.5),)),
    TokenLogprob(b"\x98\x80", -0.25, ((b"\x98\x80", -0.25),)),
)


def answer(tmp_path: Path, *, stream: bool, **fields: Any) -> list[Json]:
    """The `logprobs` of each choice or chunk."""
    deltas = [Delta(0, "Say", 0, logprobs=TOKENS[:1]), Delta(0, " 😀", 2, "length", logprobs=TOKENS[1:])]
    played = ScriptedApp(tmp_path, [[Accepted("r", "b", 1)], [*deltas, Finished(1, 0, 2, aborted=False)]])
    body = SAY | {"echo": True, "max_tokens": 2, "stream": stream} | fields
    response = played.ask("POST", PATH, body)
    if not stream:
        objects = [response.text]
    else:
        lines = [line for line in response.text.splitlines() if line and "[DONE]" not in line]
        objects = [line.removeprefix("data: ") for line in lines]
    completions = [TextCompletion.model_validate_json(each, strict=True) for each in objects]
    return [completion.choices[0].model_dump()["logprobs"] for completion in completions]


@pytest.mark.parametrize("stream", [False, True])
def test_the_token_drawn_is_told_beside_the_likeliest_and_never_instead(tmp_path: Path, stream: bool) -> None:
    pieces = answer(tmp_path, stream=stream, logprobs=1)
    joined = {name: [value for piece in pieces for value in piece[name]] for name in pieces[0]}
    assert joined == {
        "tokens": ["Say", "bytes: \\xf0\\x9f", "bytes:\\x98\\x80"],
        "token_logprobs": [None, -2.5, -0.25],
        "top_logprobs": [None, {" a": -0.5, "bytes: \\xf0\\x9f": -2.5}, {"bytes:\\x98\\x80": -0.25}],
        "text_offset": [0, 3, 5],
    }


def test_without_likeliest_tokens_the_shape_is_the_same(tmp_path: Path) -> None:
    (logprobs,) = answer(tmp_path, stream=False, logprobs=0)
    assert (logprobs["top_logprobs"], logprobs["token_logprobs"]) == (None, [None, -2.5, -0.25])
    assert answer(tmp_path / "none", stream=False) == [None]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_empty_completion_is_billed_for_its_prompt(tmp_path: Path, echo: bool, stream: bool) -> None:
    deltas = [Delta(0, "Say", 0)] if echo else []
    end = [Delta(0, "", 0, "length"), Finished(10, 4, 0, aborted=False)]
    played = ScriptedApp(tmp_path, [[Accepted("r", "b", 10)], [*deltas, *end]])
    response = played.ask("POST", PATH, SAY | {"max_tokens": 0, "echo": echo, "stream": stream})
    assert response.status_code == 200
    if not stream:
        (choice,) = response.json()["choices"]
        assert (choice["text"], choice["finish_reason"]) == ("Say" if echo else "", "length")
        assert response.json()["usage"]["completion_tokens"] == 0
    assert played.bills() == [("acme", "complete", 10, 4, 0)]
    assert played.engine.requests[0].sampling.completion_tokens_max == 0
