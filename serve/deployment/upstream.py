"""Holds every reach into internal code of Ray and uvicorn; docs/upstream.md lists them all.

Each stands in a function, a class or a constant of its own, with its reason and the place in Ray 2.60 or
uvicorn 0.54. The tests in `tests/serve/deployment/test_upstream.py` fail once that place changes, or once the
reach is not needed. Ray is imported inside functions: it reads `RAY_VARIABLES` at its first import.
"""

import asyncio
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Read by ray when it is imported and by every process it starts. None of them is documented.
RAY_VARIABLES = {
    # The default, 15, lets every other process of the machine go first.
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # User code runs in a replica's own loop: a change of thread costs up to an interpreter's switch interval.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A deployment without GPUs keeps the variables that name them.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The node's address is then 127.0.0.1, so that none of Ray's unauthenticated ports leaves the machine.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}

HEADERS_TIMEOUT_S = 10.0
HEADERS_BYTES_MAX = 64 * 1024  # of the connection's bytes before they end; the gateway's own bound is smaller
STALLED_S = 60.0  # as nginx's send_timeout


def ray_folder(folder: Path) -> dict[str, str]:
    """Returns the argument of `ray.init` that keeps its sockets and logs in `folder`.

    It has no public name.
    """
    return {"_temp_dir": str(folder)}


def keep_replica_port_on_loopback() -> None:
    """Binds this replica's inter-deployment gRPC port to loopback.

    Ray binds it to every interface (serve/_private/replica.py, `"[::]:0"`), unauthenticated, and what arrives
    there is unpickled. There is no setting for it. Ray opens it after the deployment's constructor, so a call
    there is in time.
    """
    from ray.serve._private import replica

    bind = replica.add_port_to_grpc_server
    if bind.__module__.startswith("ray."):  # not ours already

        def bind_loopback(server: Any, address: str) -> int:
            return int(bind(server, address.replace("[::]:", "127.0.0.1:")))

        replica.add_port_to_grpc_server = bind_loopback


def ongoing_requests(server: uvicorn.Server) -> int:
    """Counts the requests that `server` is answering. uvicorn keeps them for its own shutdown only."""
    return len(server.server_state.tasks)


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes connections whose headers do not end in time, and those of clients that stopped reading.

    uvicorn waits for headers without a limit and keeps all of them: a few thousand idle connections would
    exhaust it. It also waits without a limit for a client that reads no more. Here a client is cut off that
    has taken nothing for STALLED_S. uvicorn has no setting for either.
    """

    _headers_deadline: asyncio.TimerHandle | None = None
    _headers_bytes = 0
    _stall_check: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_complete()
        self._stop_stall_checks()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._schedule_stall_check(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_stall_checks()
        super().resume_writing()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect_headers()

    def on_headers_complete(self) -> None:
        self._headers_complete()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._headers_deadline is not None:
            self._headers_bytes += len(data)
            if self._headers_bytes > HEADERS_BYTES_MAX:
                self.transport.close()

    def _expect_headers(self) -> None:
        if self._headers_deadline is None:
            self._headers_bytes = 0
            self._headers_deadline = self.loop.call_later(HEADERS_TIMEOUT_S, self.transport.close)

    def _headers_complete(self) -> None:
        if self._headers_deadline is not None:
            self._headers_deadline.cancel()
            self._headers_deadline = None

    def _schedule_stall_check(self, unsent_bytes: int) -> None:
        self._stall_check = self.loop.call_later(STALLED_S, self._abort_if_stalled, unsent_bytes)

    def _abort_if_stalled(self, unsent_bytes_before: int) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes < unsent_bytes_before:
            self._schedule_stall_check(unsent_bytes)
        else:
            self.transport.abort()

    def _stop_stall_checks(self) -> None:
        if self._stall_check is not None:
            self._stall_check.cancel()
            self._stall_check = None
