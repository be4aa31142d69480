"""The connection to a client: what is sent on it, and what happens when the client leaves it.

A client that goes away closes the generation, which stops the engine and bills what was generated.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import msgspec
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.context import Context
from serve.api.edge import pieces_send
from serve.call import Call
from serve.errors import BespokeError, ClientGone
from serve.generation import Generation
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
    """Sends events as they come. However it ends, the generation is closed.

    What it breaks off with is left where `edge.py` looks for it: in the scope's state, as `broken`.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        send, state = pieces_send(scope, send), scope.setdefault("state", {})
        state["broken"] = BespokeError()  # so it stays if sending ends in an exception: a bug
        try:
            async with _Presence(receive):
                async for piece in self._events:
                    if piece:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                state["broken"] = self._generation.failure
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            state["broken"] = None
        finally:
            self._generation.close()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first (raises ClientGone)."""
    async with _Presence(request.receive):
        return await work


class _Presence:
    """Cancels what is in its block when the client leaves, as asyncio.timeout does when time is up.

    Raises ClientGone then. `receive` must have given the body already.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._watching = asyncio.create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, error: object, _trace: object) -> None:
        self._watching.cancel()
        if self._left and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise ClientGone()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._left = True
        self._task.cancel()
