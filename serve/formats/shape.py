"""The connection to a client: what is sent on it, and what happens when the client leaves it.

A client that goes away closes the generation, which stops the engine and bills what was generated.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Delta
from serve.inference.request import Choice, GenerationResult

Json = dict[str, Any]


def dumps(body: Json) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # half a character, from a client who sent one
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


class ResponseFormat(Protocol):
    """One resource's wire format, for one answer."""

    def opening(self, result: GenerationResult) -> Iterable[Json]:
        """Choices to send before any text."""

    def choice(self, delta: Delta) -> Json:
        """A streamed piece of one choice."""

    def whole(self, choice: Choice, result: GenerationResult) -> Json:
        """A finished choice."""

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        """What surrounds the choices."""


def usage(tokens: Tokens) -> Json:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
    }


def whole_body(result: GenerationResult, shape: ResponseFormat) -> Json:
    """The complete answer of a generation that has gathered it (`Call.whole`)."""
    assert result.choices
    choices = [shape.whole(choice, result) for choice in result.choices]
    return shape.envelope(result, choices, streamed=False) | {"usage": usage(result.tokens)}
