"""The span of an HTTP request (opentelemetry.io/docs/specs/semconv/http/http-spans, server). Plain ASGI."""

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.tracing import Tracing

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
