"""What every request passes through: an id, a clock, a bound on its body, a count in the metrics.

Plain ASGI (asgi.readthedocs.io), because it must see streams as they are.
"""

import logging
import uuid
from collections.abc import Callable
from time import monotonic
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import logs
from serve.admission import Quota, Standing
from serve.api.errors import kind_of, render
from serve.errors import BespokeError, BodyTooLarge
from serve.metrics import Metrics

log = logging.getLogger(__name__)


UPLOAD_ROUTE, FORM_BYTES = ("POST", "/v1/files"), 64 * 1024


def body_bound(body_bytes_max: int, file_bytes_max: int) -> Callable[[Scope], int]:
    """The most bytes that a request's body may have: an upload has a file, and the form around it."""

    def of(scope: Scope) -> int:
        is_upload = (scope["method"], scope["path"]) == UPLOAD_ROUTE
        return file_bytes_max + FORM_BYTES if is_upload else body_bytes_max

    return of


class Edge:
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
        logs.handle(request_id)
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


def rate_limits(standing: Standing | None) -> dict[str, str]:
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
