"""Two ways to answer a generation request: all at once, or as server-sent events.

`Shape` is the wire format (chat or text completion); see its modules.
"""

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from fastapi import Request
from starlette.responses import Response

from serve.answer import Choice
from serve.api.connection import EventStream, Json, dumps, start, unless_gone
from serve.api.context import Context
from serve.api.errors import sse_event
from serve.api.once import answer_once
from serve.billing.pricing import Tokens
from serve.call import Call
from serve.engine.base import Delta
from serve.errors import BespokeError
from serve.generation import Generation
from serve.tenants import Principal


class Shape(Protocol):
    """One resource's wire format, for one answer."""

    def opening(self, generation: Generation) -> Iterable[Json]:
        """Choices to send before any text."""

    def choice(self, delta: Delta) -> Json:
        """A streamed piece of one choice."""

    def whole(self, choice: Choice, generation: Generation) -> Json:
        """A finished choice."""

    def envelope(self, generation: Generation, choices: list[Json], *, streamed: bool) -> Json:
        """What surrounds the choices."""


def usage(tokens: Tokens) -> Json:
    return {
        "prompt_tokens": tokens.prompt,
        "completion_tokens": tokens.completion,
        "total_tokens": tokens.prompt + tokens.completion,
        "prompt_tokens_details": {"cached_tokens": tokens.cached},
    }


def whole_body(generation: Generation, shape: Shape) -> Json:
    """The complete answer of a generation that has gathered it (`Call.whole`)."""
    assert generation.answer is not None
    choices = [shape.whole(choice, generation) for choice in generation.answer.choices]
    return shape.envelope(generation, choices, streamed=False) | {"usage": usage(generation.tokens)}


async def answer(
    request: Request,
    ctx: Context,
    who: Principal,
    call: Call,
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Start the generation and answer it. A client that leaves while it waits cancels it."""
    if not stream:
        return await answer_once(request, ctx, who, call, lambda generation: whole_body(generation, shape))
    generation = await unless_gone(request, start(request, ctx, who, call))
    return EventStream(generation, _events(generation, shape, include_usage))


async def _events(generation: Generation, shape: Shape, include_usage: bool) -> AsyncIterator[bytes]:
    # All events of an answer have the same envelope: it is encoded once, and the choice set into it.
    blank = {"usage": None} if include_usage else {}
    envelope = dumps(shape.envelope(generation, [], streamed=True) | blank)
    head, _, tail = envelope.partition(b'"choices":[]')
    head, tail = b"data: " + head + b'"choices":[', b"]" + tail + b"\n\n"

    def event(choice: Json) -> bytes:
        return head + dumps(choice) + tail

    opening = b"".join(event(choice) for choice in shape.opening(generation))
    try:
        async for batch in generation:
            yield opening + b"".join(event(shape.choice(one)) for one in batch if _says(one))
            opening = b""
    except BespokeError as error:
        yield sse_event(error)
        return
    closing = b""
    if include_usage:
        last = shape.envelope(generation, [], streamed=True) | {"usage": usage(generation.tokens)}
        closing = b"data: " + dumps(last) + b"\n\n"
    yield closing + b"data: [DONE]\n\n"


def _says(delta: Delta) -> bool:
    """Some tokens add nothing yet: half a character, the middle of a tool call."""
    return bool(delta.text or delta.finish_reason or delta.tool_calls or delta.reasoning or delta.logprobs)
