"""What Ray Serve's HTTP proxy does around every request of ours; the proxy imports it by name."""

import asyncio
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class OneRequestId:
    """Answers carry one request id, the ledger's.

    The proxy takes a client's x-request-id for its own and adds it to the answer beside the gateway's.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            del MutableHeaders(scope=scope)["x-request-id"]

        async def send_one(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                ours = [value for value in headers.getlist("x-request-id") if value.startswith("req_")]
                if ours:
                    headers["x-request-id"] = ours[0]
            await send(message)

        await self._app(scope, receive, send_one)


HEADERS_TIMEOUT_S = 10.0
HEADERS_BYTES_MAX = 64 * 1024  # of the connection's bytes before they end; the gateway's own bound is smaller


def bounded(protocol: Any) -> Any:
    """uvicorn's protocol `protocol`, which closes a connection whose headers do not end, or not in time.

    uvicorn 0.54 waits for them for ever and keeps all of them: a few thousand idle connections would do.
    """

    class Bounded(protocol):  # type: ignore[misc]
        _waiting: asyncio.TimerHandle | None = None
        _early_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def connection_lost(self, error: Exception | None) -> None:
            self._have_headers()
            super().connection_lost(error)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._expect_headers()

        def on_headers_complete(self) -> None:
            self._have_headers()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._waiting is not None:
                self._early_bytes += len(data)
                if self._early_bytes > HEADERS_BYTES_MAX:
                    self.transport.close()

        def _expect_headers(self) -> None:
            if self._waiting is None:
                self._early_bytes = 0
                self._waiting = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

        def _have_headers(self) -> None:
            if self._waiting is not None:
                self._waiting.cancel()
                self._waiting = None

    return Bounded


def middlewares() -> list[Middleware]:
    from uvicorn.protocols.http import auto

    auto.AutoHTTPProtocol = bounded(auto.AutoHTTPProtocol)
    return [Middleware(OneRequestId)]
