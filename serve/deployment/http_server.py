"""A gateway replica's own HTTP server: uvicorn on a port that all replicas share.

Each replica listens on the port itself (SO_REUSEPORT, socket(7)) and the kernel spreads new connections
over them. There is no proxy process between a client and its gateway.
"""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEADERS_TIMEOUT_S = 10.0
KEEP_ALIVE_S = 90  # longer than clients and load balancers keep idle connections, so they close first
STALLED_S = 60.0  # as nginx's send_timeout
HEADERS_BYTES_MAX = 64 * 1024  # of the connection's bytes before they end; the gateway's own bound is smaller


def bounded(protocol: Any) -> Any:
    """uvicorn's protocol `protocol`, which closes a connection whose headers do not end, or not in time.

    uvicorn 0.54 waits for them for ever and keeps all of them: a few thousand idle connections would do. Nor
    does it end to wait for a client that reads no more: one is cut off that has taken nothing for STALLED_S.
    """

    class Bounded(protocol):  # type: ignore[misc]
        _waiting: asyncio.TimerHandle | None = None
        _early_bytes = 0
        _stalling: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def connection_lost(self, error: Exception | None) -> None:
            self._have_headers()
            self._watch_no_more()
            super().connection_lost(error)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch(self.transport.get_write_buffer_size())

        def resume_writing(self) -> None:
            self._watch_no_more()
            super().resume_writing()

        def _watch(self, left: int) -> None:
            self._stalling = self.loop.call_later(STALLED_S, self._look_again, left)

        def _look_again(self, before: int) -> None:
            left = self.transport.get_write_buffer_size()
            if left < before:
                self._watch(left)
            else:
                self.transport.abort()

        def _watch_no_more(self) -> None:
            if self._stalling is not None:
                self._stalling.cancel()
                self._stalling = None

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


class HttpServer:
    """Serves `app` on `host`:`port`, beside others that do."""

    def __init__(self, app: ASGIApp, host: str, port: int, *, drain_timeout_s: float) -> None:
        """`drain_timeout_s` after `stop` this process is killed: a fifth of it is for the last bills."""
        self._address = host, port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=bounded(HttpToolsProtocol),
                loop="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(0.8 * drain_timeout_s),
            )
        )
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once it listens. Raises OSError if the port is another's."""
        self._serving = asyncio.create_task(self._server.serve([_listener(*self._address)]))
        while not self._server.started:
            done, _ = await asyncio.wait({self._serving}, timeout=0.01)
            if done:
                self._serving.result()
                raise RuntimeError("the gateway's application did not start")

    @property
    def ongoing(self) -> int:
        """Requests that are being answered."""
        return len(self._server.server_state.tasks)

    async def stop(self) -> None:
        """Takes no more connections and returns once the last answer is sent, or is given up."""
        self._server.should_exit = True
        if self._serving is not None:
            with contextlib.suppress(asyncio.CancelledError):
                await self._serving


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener
