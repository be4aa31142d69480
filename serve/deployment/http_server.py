"""Runs a gateway replica's own HTTP server: uvicorn on a port that all replicas share.

Each replica listens on the port itself (SO_REUSEPORT, socket(7)) and the kernel spreads new connections
over them. There is no proxy process between a client and its gateway.
"""

import asyncio
import contextlib
import socket

import uvicorn
from starlette.types import ASGIApp

from serve.deployment.upstream import BoundedHttpProtocol, ongoing_requests

KEEP_ALIVE_S = 90  # longer than clients and load balancers keep idle connections, so they close first


class HttpServer:
    """Serves `app` on `host`:`port`, beside other processes that do."""

    def __init__(self, app: ASGIApp, host: str, port: int, *, drain_timeout_s: float) -> None:
        """Configures uvicorn. The process is killed `drain_timeout_s` after `stop`.

        A fifth of that time is left to settle the last requests.
        """
        self._address = host, port
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=BoundedHttpProtocol,
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
        """Starts to listen. Raises OSError if the port is taken."""
        self._serving = asyncio.create_task(self._server.serve([_listener(*self._address)]))
        while not self._server.started:
            done, _ = await asyncio.wait({self._serving}, timeout=0.01)
            if done:
                self._serving.result()
                raise RuntimeError("the gateway's application did not start")

    @property
    def ongoing(self) -> int:
        """Counts the requests that are being answered."""
        return ongoing_requests(self._server)

    async def stop(self) -> None:
        """Takes no more connections. Returns once the last answer is sent, or given up."""
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
