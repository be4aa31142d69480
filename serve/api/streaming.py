"""Two ways to answer a generation request: all at once, or as server-sent events.

`Shape` is the wire format (chat or text completion); see its modules.

The connection to a client: what is sent on it, and what happens when the client leaves it.

A client that goes away closes the generation, which stops the engine and bills what was generated.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.

A whole answer, given once: whatever it is made into, an Idempotency-Key finds it again.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.api.dependencies import Context
from serve.api.middleware import pieces_send
from serve.engine.protocol import Delta
from serve.errors import BespokeError, ClientGone
from serve.formats.errors import sse_event
from serve.formats.shape import Json, ResponseFormat, dumps, usage, whole_body
from serve.inference.generation import Generation
from serve.inference.request import CommitHook, GenerationResult, InferenceRequest
from serve.tenants import Principal


class CommitHooks:
    """Several keepers as one, in their order."""

    def __init__(self, *commit_hooks: CommitHook) -> None:
        self._commit_hooks = commit_hooks

    def on_hold(self, connection: sa.Connection, at: datetime) -> None:
        for hook in self._commit_hooks:
            hook.on_hold(connection, at)

    def on_settle(self, connection: sa.Connection, result: GenerationResult) -> None:
        for hook in self._commit_hooks:
            hook.on_settle(connection, result)

    def on_void(self, connection: sa.Connection) -> None:
        for hook in self._commit_hooks:
            hook.on_void(connection)


async def answer_once(
    request: Request,
    ctx: Context,
    who: Principal,
    call: InferenceRequest,
    render: Callable[[GenerationResult], dict[str, Any]],
) -> Response:
    """Generate `call`, which is whole, and answer what `render` makes of it.

    Under an Idempotency-Key the answer is kept, and then its client's leaving does not stop it: the retry
    finds the answer. Without, a client that leaves while it waits cancels it.
    """
    key = request.headers.get("idempotency-key")
    if key is not None:
        content = request.url.path.encode() + b"\n" + await request.body()
        at = ctx.gateway.context.now()
        kept = await asyncio.to_thread(ctx.idempotency.find, who.tenant, key, content, at=at)
        if kept is not None:
            headers = {"idempotency-replayed": "true", "x-original-request-id": kept.request_id}
            return Response(kept.body, media_type="application/json", headers=headers)
        keeper: CommitHook = ctx.idempotency.commit_hook(
            who.tenant, key, content, call.request_id, lambda result: dumps(render(result)).decode()
        )
        if call.commit_hook is not None:
            keeper = CommitHooks(
                call.commit_hook, keeper
            )  # in this order: what the first has kept is rendered
        call = replace(call, commit_hook=keeper, survives_disconnect=True)

    async def work() -> Response:
        generation = await start(request, ctx, who, call)
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()
        return Response(dumps(render(generation.result)), media_type="application/json")

    return await cancel_on_disconnect(request, work())


T = TypeVar("T")


async def start(request: Request, ctx: Context, who: Principal, call: InferenceRequest) -> Generation:
    """`Gateway.generate`; the answer's headers will say how the caller stands with its limits."""
    generation = await ctx.gateway.generate(who, call)
    request.state.standing = generation.rate_limit_status
    return generation


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
            async with DisconnectGuard(receive):
                async for piece in self._events:
                    if piece:
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                state["broken"] = self._generation.failure
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            state["broken"] = None
        finally:
            self._generation.close()


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first (raises ClientGone)."""
    async with DisconnectGuard(request.receive):
        return await work


class DisconnectGuard:
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


async def answer(
    request: Request,
    ctx: Context,
    who: Principal,
    call: InferenceRequest,
    shape: ResponseFormat,
    *,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Start the generation and answer it. A client that leaves while it waits cancels it."""
    if not stream:
        return await answer_once(request, ctx, who, call, lambda result: whole_body(result, shape))
    generation = await cancel_on_disconnect(request, start(request, ctx, who, call))
    return EventStream(generation, _events(generation, shape, include_usage))


async def _events(generation: Generation, shape: ResponseFormat, include_usage: bool) -> AsyncIterator[bytes]:
    # All events of an answer have the same envelope: it is encoded once, and the choice set into it.
    blank = {"usage": None} if include_usage else {}
    envelope = dumps(shape.envelope(generation.result, [], streamed=True) | blank)
    head, _, tail = envelope.partition(b'"choices":[]')
    head, tail = b"data: " + head + b'"choices":[', b"]" + tail + b"\n\n"

    def event(choice: Json) -> bytes:
        return head + dumps(choice) + tail

    opening = b"".join(event(choice) for choice in shape.opening(generation.result))
    try:
        async for batch in generation:
            yield opening + b"".join(event(shape.choice(one)) for one in batch if _says(one))
            opening = b""
    except BespokeError as error:
        yield sse_event(error)
        return
    closing = b""
    if include_usage:
        result = generation.result
        last = shape.envelope(result, [], streamed=True) | {"usage": usage(result.tokens)}
        closing = b"data: " + dumps(last) + b"\n\n"
    yield closing + b"data: [DONE]\n\n"


def _says(delta: Delta) -> bool:
    """Some tokens add nothing yet: half a character, the middle of a tool call."""
    return bool(delta.text or delta.finish_reason or delta.tool_calls or delta.reasoning or delta.logprobs)
