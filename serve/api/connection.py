"""The connection to a client: what is sent on it, and what happens when the client leaves it.

A client that goes away closes the generation, which stops the engine and bills what was generated.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.context import Context
from serve.errors import ClientGone
from serve.generation import Call, Generation
from serve.tenants import Principal

Json = dict[str, Any]
T = TypeVar("T")


async def start(request: Request, ctx: Context, who: Principal, call: Call) -> Generation:
    """`Gateway.generate`; the answer's headers will say how the caller stands with its limits."""
    generation = await ctx.gateway.generate(who, call)
    request.state.standing = generation.standing
    return generation


def dumps(body: Json) -> bytes:
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:  # half a character, from a client who sent one
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")


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
                if not piece:
                    continue
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        try:
            await _first(asyncio.create_task(stream()), asyncio.create_task(_gone(receive)))
        finally:
            self._generation.close()


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
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
