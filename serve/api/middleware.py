"""What every request passes through: an id, a clock, a bound on its body, a count in the metrics.

Plain ASGI (asgi.readthedocs.io), because it must see streams as they are.

What may come in: how large headers are, how long a body may take, and bodies that are compressed.

Plain ASGI, inside `edge.py`, which bounds the bytes as they are sent; here the bound is on what they become.

The span of an HTTP request (opentelemetry.io/docs/specs/semconv/http/http-spans, server). Plain ASGI.
"""

import asyncio
import logging
import uuid
import zlib
from collections.abc import Callable
from time import monotonic
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import render
from serve.errors import (
    BespokeError,
    BodyTimeout,
    BodyTooLarge,
    HeadersTooLarge,
    InvalidRequest,
    UnsupportedEncoding,
)
from serve.formats.errors import kind_of
from serve.observability import logs
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracing
from serve.rate_limits import Quota, RateLimitStatus

# Asked every few seconds by machines; their traces would bury the others.
UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


class Traced:
    """Outermost, so that nothing is left out. There only if tracing is on."""

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        with self._tracing.request(method, scope["scheme"], _trace_context(Headers(scope=scope))) as exchange:
            try:
                await self._app(scope, receive, noting_send)
            finally:
                route = getattr(scope.get("route"), "path", None)
                exchange.ended(route, status, scope.get("state", {}).get("request_id"))


def _trace_context(headers: Headers) -> dict[str, str]:
    """W3C Trace Context's headers; two parents are none (3.2.2)."""
    found = {"traceparent": headers.getlist("traceparent"), "tracestate": headers.getlist("tracestate")}
    if len(found["traceparent"]) != 1:
        return {}
    return {name: ",".join(values) for name, values in found.items() if values}


HEADER_BYTES_MAX = 16 * 1024
# zlib's window sizes that say: a gzip header is there (RFC 1952), or a zlib one (RFC 1950).
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}


class BodyMiddleware:
    """The largest body that a route takes must be complete in the time that it takes at `bytes_per_s_min`."""

    def __init__(
        self, app: ASGIApp, *, body_bytes_max: Callable[[Scope], int], bytes_per_s_min: float
    ) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max
        self._bytes_per_s_min = bytes_per_s_min

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        encoding = Headers(scope=scope).get("content-encoding", "identity").strip().lower()
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES_MAX:
            await render(HeadersTooLarge(HEADER_BYTES_MAX), scope["path"])(scope, receive, send)
            return
        if encoding != "identity" and encoding not in _WINDOW_BITS:
            await render(UnsupportedEncoding(encoding[:40]), scope["path"])(scope, receive, send)
            return
        most = self._body_bytes_max(scope)
        incoming = _in_time(receive, most / self._bytes_per_s_min)
        if encoding != "identity":
            incoming = _inflated(incoming, _WINDOW_BITS[encoding], most)
            hidden = (b"content-encoding", b"content-length")
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in hidden]
        await self._app(scope, incoming, send)


def _in_time(receive: Receive, timeout_s: float) -> Receive:
    """`receive`, which raises BodyTimeout if the body is not complete in time. Then it may wait for ever."""
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    complete = False

    async def in_time() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        try:
            async with asyncio.timeout_at(deadline_s):
                message = await receive()
        except TimeoutError as error:
            raise BodyTimeout(timeout_s) from error
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return in_time


def _inflated(receive: Receive, window_bits: int, most: int) -> Receive:
    """`receive`, decompressed as it comes, and never more than `most` bytes of it.

    Raises BodyTooLarge, and InvalidRequest if the bytes are not what they are said to be.
    """
    inflater = zlib.decompressobj(window_bits)
    total = 0

    async def inflated() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] != "http.request":
            return message
        try:
            # One byte more than there may be: enough to know, and never a bomb's worth.
            body = inflater.decompress(message.get("body", b""), most - total + 1)
        except zlib.error as error:
            raise InvalidRequest("The body is not compressed as Content-Encoding says.") from error
        total += len(body)
        if total > most:
            raise BodyTooLarge(most)
        more = message.get("more_body", False)
        if not more and not inflater.eof:
            raise InvalidRequest("The compressed body ends too early.")
        return {"type": "http.request", "body": body, "more_body": more}

    return inflated


log = logging.getLogger(__name__)


UPLOAD_ROUTE, FORM_BYTES = ("POST", "/v1/files"), 64 * 1024


def body_bound(body_bytes_max: int, file_bytes_max: int) -> Callable[[Scope], int]:
    """The most bytes that a request's body may have: an upload has a file, and the form around it."""

    def of(scope: Scope) -> int:
        is_upload = (scope["method"], scope["path"]) == UPLOAD_ROUTE
        return file_bytes_max + FORM_BYTES if is_upload else body_bytes_max

    return of


class RequestMiddleware:
    """`body_bytes_max` bounds every body but an upload's, which may hold a file of `file_bytes_max`."""

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, body_bytes_max: int, file_bytes_max: int = 0
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._body_bytes_max = body_bound(body_bytes_max, file_bytes_max)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = monotonic()
        # Ours, never the client's: it is the ledger's key.
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = f"req_{uuid.uuid4().hex}"
        state["pieces_send"] = send
        logs.set_log_context(request_id)
        status, begun = 500, False
        received_bytes, most = 0, self._body_bytes_max(scope)

        async def bounded_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > most:
                raise BodyTooLarge(most)
            return message

        async def stamped_send(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                told = {
                    "x-request-id": request_id,
                    "openai-processing-ms": str(round((monotonic() - started_s) * 1000)),
                    **rate_limits(state.get("standing")),
                }
                headers = [(name.encode(), value.encode()) for name, value in told.items()]
                message["headers"] = [*message.get("headers", ()), *headers]
            await send(message)

        try:
            declared = Headers(scope=scope).get("content-length", "0")
            if declared.isdigit() and int(declared) > most:
                await render(BodyTooLarge(most), scope["path"])(scope, receive, stamped_send)
            else:
                await self._app(scope, bounded_receive, stamped_send)
        except Exception as error:
            # The path only: bodies hold prompts and headers hold keys.
            log.error("unexpected error at %s %s", scope["method"], scope["path"], exc_info=error)
            if begun:
                raise
            await render(BespokeError(), scope["path"])(scope, receive, stamped_send)
        finally:
            route, took_s = _route(scope), monotonic() - started_s
            self._metrics.request(route, status, took_s)
            took_ms = round(took_s * 1e3)
            what = {"method": scope["method"], "route": route, "status": status, "duration_ms": took_ms}
            if status >= 400:
                refused = state.get("refused") or BespokeError()
                self._metrics.refused(refused, *kind_of(refused))
            elif (broken := state.get("broken")) is not None:
                kind, code = kind_of(broken)
                self._metrics.broken(route, kind, code)
                what["broken"] = code
            log.info("answered", extra=what)


def pieces_send(scope: Scope, send: Send) -> Send:
    """For the pieces of an answer that has begun with `send`: past all that looks only at how it begins."""
    past: Send = scope.get("state", {}).get("pieces_send", send)
    return past


def rate_limits(standing: RateLimitStatus | None) -> dict[str, str]:
    """How the caller stands with its limits: platform.openai.com/docs/guides/rate-limits, headers."""
    headers = {}
    for what in ("requests", "tokens"):
        quota: Quota | None = getattr(standing, what, None)
        if quota is not None:
            headers[f"x-ratelimit-limit-{what}"] = str(quota.limit)
            headers[f"x-ratelimit-remaining-{what}"] = str(quota.remaining)
            headers[f"x-ratelimit-reset-{what}"] = f"{quota.reset_s:g}s"
    return headers


def _route(scope: Scope) -> str:
    """The route's template, so that the label is bounded whatever paths clients try."""
    route: Any = scope.get("route")
    return getattr(route, "path", "other")
