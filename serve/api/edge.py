"""What every request passes through: an id, a clock, a bound on its body, a count in the metrics.

Plain ASGI (asgi.readthedocs.io), because it must see streams as they are.
"""

import logging
import uuid
from time import monotonic
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.api.errors import render
from serve.errors import BodyTooLarge
from serve.metrics import Metrics

log = logging.getLogger(__name__)


class Edge:
    def __init__(self, app: ASGIApp, *, metrics: Metrics, body_bytes_max: int) -> None:
        self._app = app
        self._metrics = metrics
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = monotonic()
        # Ours, never the client's: it is the ledger's key.
        request_id = scope.setdefault("state", {})["request_id"] = f"req_{uuid.uuid4().hex}"
        status = 500
        received_bytes = 0

        async def bounded_receive() -> Message:
            nonlocal received_bytes
            message = await receive()
            received_bytes += len(message.get("body", b""))
            if received_bytes > self._body_bytes_max:
                raise BodyTooLarge(self._body_bytes_max)
            return message

        async def stamped_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-processing-ms"] = str(round((monotonic() - started_s) * 1000))
            await send(message)

        try:
            declared = Headers(scope=scope).get("content-length", "0")
            if declared.isdigit() and int(declared) > self._body_bytes_max:
                await render(BodyTooLarge(self._body_bytes_max))(scope, receive, stamped_send)
            else:
                await self._app(scope, bounded_receive, stamped_send)
        finally:
            route = _route(scope)
            self._metrics.request(route, status)
            log.info(
                "%s %s %s %.0f ms %s",
                scope["method"],
                route,
                status,
                (monotonic() - started_s) * 1e3,
                request_id,
            )


def _route(scope: Scope) -> str:
    """The route's template, so that the label is bounded whatever paths clients try."""
    route: Any = scope.get("route")
    return getattr(route, "path", "other")
