"""Answers a generation request: as one JSON body, or as a stream of server-sent events.

A client that leaves closes the generation, which stops the engine and bills the tokens generated so far.
SSE: html.spec.whatwg.org/multipage/server-sent-events.html.
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
from serve.api.middleware import direct_send
from serve.engine.protocol import Delta
from serve.errors import BespokeError, ClientGone
from serve.formats.errors import sse_event
from serve.formats.response_format import Json, ResponseFormat, complete_body, dumps, usage
from serve.inference.generation import Generation
from serve.inference.request import CommitHook, GenerationResult, InferenceRequest
from serve.tenants import Principal

T = TypeVar("T")


async def answer(
    request: Request,
    ctx: Context,
    principal: Principal,
    inference_request: InferenceRequest,
    response_format: ResponseFormat,
    *,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Run the inference request and answer it in `response_format`.

    A client that leaves before the answer starts cancels the request.
    """
    if not stream:
        return await answer_complete(
            request, ctx, principal, inference_request, lambda result: complete_body(result, response_format)
        )
    generation = await cancel_on_disconnect(request, start(request, ctx, principal, inference_request))
    return EventStream(generation, _events(generation, response_format, include_usage))


async def answer_complete(
    request: Request,
    ctx: Context,
    principal: Principal,
    inference_request: InferenceRequest,
    render: Callable[[GenerationResult], dict[str, Any]],
) -> Response:
    """Run the inference request, which collects its choices, and answer the JSON that `render` makes.

    With an Idempotency-Key the answer is stored, and a client that leaves does not stop it: its retry gets
    the stored answer. Without a key, a client that leaves cancels the request.
    """
    rendered = Rendered(render)
    key = request.headers.get("idempotency-key")
    if key is not None:
        content = request.url.path.encode() + b"\n" + await request.body()
        at = ctx.gateway.context.now()
        stored = await asyncio.to_thread(ctx.idempotency.find, principal.tenant, key, content, at=at)
        if stored is not None:
            headers = {"idempotency-replayed": "true", "x-original-request-id": stored.request_id}
            return Response(stored.body, media_type="application/json", headers=headers)
        commit_hook: CommitHook = ctx.idempotency.commit_hook(
            principal.tenant,
            key,
            content,
            inference_request.request_id,
            lambda result: rendered.bytes_of(result).decode(),
        )
        if inference_request.commit_hook is not None:
            # In this order: `render` may read what the request's own hook has stored.
            commit_hook = CommitHooks(inference_request.commit_hook, commit_hook)
        inference_request = replace(inference_request, commit_hook=commit_hook, survives_disconnect=True)

    async def run() -> Response:
        generation = await start(request, ctx, principal, inference_request)
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()
        return Response(await rendered.body(generation.result), media_type="application/json")

    return await cancel_on_disconnect(request, run())


class Rendered:
    """Renders one complete answer, once: for the store with the settlement, or for the client after it."""

    def __init__(self, render: Callable[[GenerationResult], dict[str, Any]]) -> None:
        self._render = render
        self._bytes: bytes | None = None

    def bytes_of(self, result: GenerationResult) -> bytes:
        if self._bytes is None:
            self._bytes = dumps(self._render(result))
        return self._bytes

    async def body(self, result: GenerationResult) -> bytes:
        """`bytes_of` for the client. Log-probabilities and vectors are megabytes, so a thread makes them."""
        request = result.request
        if self._bytes is not None or (request.sampling.logprobs is None and request.pooling is None):
            return self.bytes_of(result)
        return await asyncio.to_thread(self.bytes_of, result)


async def count(
    request: Request, ctx: Context, principal: Principal, inference_request: InferenceRequest
) -> int:
    """`Gateway.count_prompt_tokens`. A client that leaves cancels it."""
    counting = ctx.gateway.count_prompt_tokens(principal, inference_request)
    tokens, request.state.rate_limit_status = await cancel_on_disconnect(request, counting)
    return tokens


async def start(
    request: Request, ctx: Context, principal: Principal, inference_request: InferenceRequest
) -> Generation:
    """`Gateway.generate`, which leaves for the answer's headers what the caller may use and still has."""
    generation = await ctx.gateway.generate(principal, inference_request)
    request.state.rate_limit_status = generation.rate_limit_status
    request.state.completion_tokens_granted = generation.completion_tokens_granted
    return generation


async def _events(
    generation: Generation, response_format: ResponseFormat, include_usage: bool
) -> AsyncIterator[bytes]:
    # All events of an answer have the same envelope: it is encoded once, and each choice is inserted.
    no_usage = {"usage": None} if include_usage else {}
    envelope = dumps(response_format.envelope(generation.result, [], streamed=True) | no_usage)
    head, _, tail = envelope.partition(b'"choices":[]')
    head, tail = b"data: " + head + b'"choices":[', b"]" + tail + b"\n\n"

    def event(choice: Json) -> bytes:
        return head + dumps(choice) + tail

    opening = b"".join(map(event, response_format.opening_choices(generation.result)))
    try:
        async for batch in generation:
            events = (event(response_format.streamed_choice(delta)) for delta in batch if _has_content(delta))
            yield opening + b"".join(events)
            opening = b""
    except BespokeError as error:
        yield sse_event(error)
        return
    closing = b""
    if include_usage:
        result = generation.result
        last = response_format.envelope(result, [], streamed=True) | {"usage": usage(result.tokens)}
        closing = b"data: " + dumps(last) + b"\n\n"
    yield closing + b"data: [DONE]\n\n"


def _has_content(delta: Delta) -> bool:
    """False for tokens that add nothing yet: half a character, the middle of a tool call."""
    return bool(delta.text or delta.finish_reason or delta.tool_calls or delta.reasoning or delta.logprobs)


class EventStream(Response):
    """Sends events as they come, and closes the generation however the stream ends.

    An error that breaks off the stream is left for `middleware.RequestMiddleware`, in the scope's state as
    `stream_error`.
    """

    def __init__(self, generation: Generation, events: AsyncIterator[bytes]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._generation = generation
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        send, state = direct_send(scope, send), scope.setdefault("state", {})
        state["stream_error"] = BespokeError()  # stays if sending ends in an exception: a bug
        try:
            async with DisconnectGuard(receive):
                async for chunk in self._events:
                    if chunk:
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                state["stream_error"] = self._generation.failure
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            state["stream_error"] = None
        finally:
            self._generation.close()


async def cancel_on_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled if the client leaves first. Raises ClientGone then."""
    async with DisconnectGuard(request.receive):
        return await work


class DisconnectGuard:
    """Cancels its block when the client leaves, as asyncio.timeout does when time is up.

    Raises ClientGone then. The body must have been read from `receive` already.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._disconnected = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(self, kind: type[BaseException] | None, error: object, _trace: object) -> None:
        self._watcher.cancel()
        cancelled = kind is asyncio.CancelledError
        if self._disconnected and self._task.uncancel() <= self._cancelling and cancelled:
            raise ClientGone()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._disconnected = True
        self._task.cancel()


class CommitHooks:
    """Runs several commit hooks as one, in their order."""

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
