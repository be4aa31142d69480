"""Wraps every HTTP request: its id, clock, bounds, metrics and log line; compressed bodies; its trace span.

Plain ASGI (asgi.readthedocs.io), because the middleware must see streams as they are. From the outside in:
`TracingMiddleware` (if tracing is on), `RequestMiddleware`, `BodyMiddleware`, then the application.
"""

import asyncio
import logging
import re
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
from serve.formats.body_budget import check_body
from serve.formats.errors import kind_of
from serve.observability import logs
from serve.observability.metrics import Metrics
from serve.observability.tracing import Tracing
from serve.rate_limits import Quota, RateLimitStatus

log = logging.getLogger(__name__)

HEADER_BYTES_MAX = 16 * 1024
# Their bodies are forms with a file, or with a part of one.
UPLOAD_PATHS, FORM_BYTES = re.compile(r"/v1/files|/v1/uploads/[^/]+/parts"), 64 * 1024
# zlib's window bits that expect a gzip header (RFC 1952), or a zlib header (RFC 1950).
_WINDOW_BITS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
# Machines ask these every few seconds; their traces would bury the others.
UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"})


class RequestMiddleware:
    """Gives a request its id, bounds its body, turns a bug into a 500, and records how it ended.

    body_bytes_max: of every body but an upload's, which may hold a file of `file_bytes_max`.
    """

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
        started_at_s = monotonic()
        # The server makes the id, never the client: it is the ledger's key.
        state = scope.setdefault("state", {})
        request_id = state["request_id"] = f"req_{uuid.uuid4().hex}"
        state["direct_send"] = send
        logs.set_log_context(request_id)
        status, started = 500, False
        received_bytes, bytes_max = 0, self._body_bytes_max(scope)

        async def bounded_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > bytes_max:
                raise BodyTooLarge(bytes_max)
            return message

        async def stamped_send(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = {
                    "x-request-id": request_id,
                    "openai-processing-ms": str(round((monotonic() - started_at_s) * 1000)),
                    **rate_limit_headers(state.get("rate_limit_status")),
                    **granted_headers(state.get("completion_tokens_granted")),
                }
                encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
                message["headers"] = [*message.get("headers", ()), *encoded]
            await send(message)

        try:
            declared = Headers(scope=scope).get("content-length", "0")
            if declared.isdigit() and int(declared) > bytes_max:
                await render(BodyTooLarge(bytes_max), scope["path"])(scope, receive, stamped_send)
            else:
                await self._app(scope, bounded_receive, stamped_send)
        except Exception as error:
            # The path only: bodies hold prompts and headers hold keys.
            log.error("unexpected error at %s %s", scope["method"], scope["path"], exc_info=error)
            if started:
                raise
            await render(BespokeError(), scope["path"])(scope, receive, stamped_send)
        finally:
            route, took_s = _route(scope), monotonic() - started_at_s
            self._metrics.request(route, status, took_s)
            took_ms = round(took_s * 1e3)
            fields = {"method": scope["method"], "route": route, "status": status, "duration_ms": took_ms}
            if status >= 400:
                refusal = state.get("error") or BespokeError()
                self._metrics.refused(refusal, *kind_of(refusal))
            elif (stream_error := state.get("stream_error")) is not None:
                kind, code = kind_of(stream_error)
                self._metrics.broken(route, kind, code)
                fields["broken"] = code
            log.info("answered", extra=fields)


def body_bound(body_bytes_max: int, file_bytes_max: int) -> Callable[[Scope], int]:
    """Returns the function from a request to the most bytes of its body. An upload has a file in a form."""

    def bytes_max(scope: Scope) -> int:
        return file_bytes_max + FORM_BYTES if is_upload(scope) else body_bytes_max

    return bytes_max


def is_upload(scope: Scope) -> bool:
    """True for a form with a file, which is written to disk as it comes; other bodies are JSON."""
    return scope["method"] == "POST" and UPLOAD_PATHS.fullmatch(scope["path"]) is not None


def direct_send(scope: Scope, send: Send) -> Send:
    """The `send` below all middleware, for the chunks of an answer whose start went through `send`.

    The middleware looks only at the start of an answer.
    """
    direct: Send = scope.get("state", {}).get("direct_send", send)
    return direct


def rate_limit_headers(status: RateLimitStatus | None) -> dict[str, str]:
    """The caller's remaining quota: platform.openai.com/docs/guides/rate-limits, headers."""
    headers = {}
    for unit in ("requests", "tokens"):
        quota: Quota | None = getattr(status, unit, None)
        if quota is not None:
            headers[f"x-ratelimit-limit-{unit}"] = str(quota.limit)
            headers[f"x-ratelimit-remaining-{unit}"] = str(quota.remaining)
            headers[f"x-ratelimit-reset-{unit}"] = f"{quota.reset_s:g}s"
    return headers


def granted_headers(completion_tokens: int | None) -> dict[str, str]:
    """The most tokens that the answer could have, where that is less than the caller asked for."""
    return {} if completion_tokens is None else {"x-bespoke-max-tokens": str(completion_tokens)}


def _route(scope: Scope) -> str:
    """The route's template: the number of labels stays bounded, whatever paths clients try."""
    route: Any = scope.get("route")
    return getattr(route, "path", "other")


class BodyMiddleware:
    """Bounds headers and the time of a body, and decompresses it under the same bound as a plain body.

    A body may take as long as the route's largest body takes at `bytes_per_s_min`. `RequestMiddleware`
    bounds the bytes as they are sent; here the bound is on the decompressed bytes.
    """

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
        bytes_max = self._body_bytes_max(scope)
        body_receive = _in_time(receive, bytes_max / self._bytes_per_s_min)
        if encoding != "identity":
            body_receive = _inflated(body_receive, _WINDOW_BITS[encoding], bytes_max)
            hidden = (b"content-encoding", b"content-length")
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] not in hidden]
        if not is_upload(scope):
            body_receive = _checked(body_receive)
        await self._app(scope, body_receive, send)


def _in_time(receive: Receive, timeout_s: float) -> Receive:
    """`receive` that raises BodyTimeout if the body is late. After the body it waits without a bound."""
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


def _inflated(receive: Receive, window_bits: int, bytes_max: int) -> Receive:
    """`receive` that decompresses the body as it comes, up to `bytes_max` bytes.

    Raises BodyTooLarge, and InvalidRequest if the bytes are not what Content-Encoding says.
    """
    inflater = zlib.decompressobj(window_bits)
    total = 0

    async def inflated() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] != "http.request":
            return message
        try:
            # One byte above the bound is enough to see a body that is too large, such as a zip bomb.
            # In a thread, which zlib leaves the interpreter free for.
            compressed = message.get("body", b"")
            body = await asyncio.to_thread(inflater.decompress, compressed, bytes_max - total + 1)
        except zlib.error as error:
            raise InvalidRequest("The body is not compressed as Content-Encoding says.") from error
        total += len(body)
        if total > bytes_max:
            raise BodyTooLarge(bytes_max)
        more = message.get("more_body", False)
        if not more and not inflater.eof:
            raise InvalidRequest("The compressed body ends too early.")
        return {"type": "http.request", "body": body, "more_body": more}

    return inflated


def _checked(receive: Receive) -> Receive:
    """`receive` that gives the whole body at once, within the budget of `serve.formats.body_budget`."""
    complete = False

    async def checked() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        pieces: list[bytes] = []
        while not complete:
            message = await receive()
            if message["type"] != "http.request":
                return message
            pieces.append(message.get("body", b""))
            complete = not message.get("more_body", False)
        body = b"".join(pieces)
        check_body(body)
        return {"type": "http.request", "body": body, "more_body": False}

    return checked


class TracingMiddleware:
    """Traces the HTTP request as a server span (opentelemetry.io/docs/specs/semconv/http/http-spans).

    Outermost, so that the span covers everything. Installed only if tracing is on.
    """

    def __init__(self, app: ASGIApp, *, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNTRACED:
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def status_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        with self._tracing.request(method, scope["scheme"], _trace_context(Headers(scope=scope))) as exchange:
            try:
                await self._app(scope, receive, status_send)
            finally:
                route = getattr(scope.get("route"), "path", None)
                exchange.ended(route, status, scope.get("state", {}).get("request_id"))


def _trace_context(headers: Headers) -> dict[str, str]:
    """W3C Trace Context's headers. Two parents count as none (section 3.2.2)."""
    values = {name: headers.getlist(name) for name in ("traceparent", "tracestate")}
    if len(values["traceparent"]) != 1:
        return {}
    return {name: ",".join(parts) for name, parts in values.items() if parts}
