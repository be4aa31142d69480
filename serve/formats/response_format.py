"""Defines how the answer to one request is written as JSON (`ResponseFormat`), and encodes JSON.

The class is about the wire format of a whole answer, such as a `chat.completion` object. The chat body's
field `response_format` is something else: it asks the model for JSON, and is a `StructuredOutput`
(chat.py).
"""

import json
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Delta
from serve.inference.answer import Choice
from serve.inference.request import GenerationResult

Json = dict[str, Any]


class CompleteFormat(Protocol):
    """Writes one complete answer in one resource's wire format: an envelope around choices."""

    def complete_choice(self, choice: Choice, result: GenerationResult) -> Json:
        """One finished choice."""

    def envelope(self, result: GenerationResult, choices: list[Json], *, streamed: bool) -> Json:
        """The object around the choices."""


class ResponseFormat(CompleteFormat, Protocol):
    """Writes one answer complete or streamed.

    A format may keep state between the deltas of its answer, so every answer gets a new one.
    """

    def opening_choices(self, result: GenerationResult) -> Iterable[Json]:
        """Choices to send before the first delta of a stream."""

    def streamed_choice(self, delta: Delta) -> Json:
        """One delta of one choice."""


def complete_body(result: GenerationResult, response_format: CompleteFormat) -> Json:
    """The complete answer of a request that collects its choices (`InferenceRequest.collect`)."""
    assert result.choices
    choices = [response_format.complete_choice(choice, result) for choice in result.choices]
    body = response_format.envelope(result, choices, streamed=False)
    body.setdefault("usage", usage(result.tokens))
    return body


def usage(tokens: Tokens) -> Json:
    """OpenAI's `usage` object of chat and text completions."""
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
    }


def dumps(body: Json) -> bytes:
    """JSON text in UTF-8. A lone surrogate becomes a replacement character."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # a client sent half a character
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
