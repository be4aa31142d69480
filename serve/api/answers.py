"""Two ways to answer a generation request: all at once, or as server-sent events.

Both watch the connection: a client that goes away closes the generation, which stops the engine and
bills what was generated. `Shape` is the wire format (chat or text completion); see its modules.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serve.api.errors import sse_event
from serve.billing.pricing import Tokens
from serve.engine.base import Delta
from serve.errors import BespokeError, ClientGone
from serve.generation import Generation

Json = dict[str, Any]
T = TypeVar("T")


class Shape(Protocol):
    """One resource's wire format."""

    def opening(self, generation: Generation) -> Iterable[Json]:
        """Choices to send before any text."""

    def choice(self, delta: Delta) -> Json:
        """A streamed piece of one choice."""

    def whole(self, index: int, text: str, finish_reason: str | None) -> Json:
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


async def answer(
    request: Request,
    start: Callable[[], Coroutine[Any, Any, Generation]],
    shape: Shape,
    *,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Start the generation and answer it. A client that leaves while it waits cancels it."""
    if stream:
        generation = await _unless_gone(request, start())
        return EventStream(generation, _events(generation, shape, include_usage))
    return await _unless_gone(request, _whole(start, shape))


async def _whole(start: Callable[[], Coroutine[Any, Any, Generation]], shape: Shape) -> Response:
    generation = await start()
    texts = [""] * generation.call.sampling.n
    reasons: list[str | None] = [None] * generation.call.sampling.n
    try:
        async for batch in generation:
            for delta in batch:
                texts[delta.index] += delta.text
                reasons[delta.index] = delta.finish_reason or reasons[delta.index]
    finally:
        generation.close()
    choices = [
        shape.whole(index, text, reason)
        for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    body = shape.envelope(generation, choices, streamed=False)
    return JSONResponse(body | {"usage": usage(generation.tokens)})


async def _events(generation: Generation, shape: Shape, include_usage: bool) -> AsyncIterator[bytes]:
    blank = {"usage": None} if include_usage else {}

    def event(choices: list[Json], extra: Json) -> bytes:
        body = shape.envelope(generation, choices, streamed=True) | extra
        return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"

    opening = b"".join(event([choice], blank) for choice in shape.opening(generation))
    try:
        async for batch in generation:
            yield opening + b"".join(event([shape.choice(delta)], blank) for delta in batch)
            opening = b""
    except BespokeError as error:
        yield sse_event(error)
        return
    closing = event([], {"usage": usage(generation.tokens)}) if include_usage else b""
    yield closing + b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends events as they come. However it ends, the generation is closed."""

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}

        async def stream() -> None:
            await send(start)
            async for piece in self._events:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _first(asyncio.create_task(stream()), asyncio.create_task(_gone(receive)))
        finally:
            self._generation.close()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first (raises ClientGone)."""
    task = asyncio.create_task(work)
    if not await _first(task, asyncio.create_task(_gone(request.receive))):
        raise ClientGone()
    return task.result()


async def _first(work: "asyncio.Task[Any]", gone: "asyncio.Task[None]") -> bool:
    """True if `work` was done first, and then raises what it raised; whatever is left is cancelled."""
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            return True
        return False
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
