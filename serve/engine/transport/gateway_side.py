"""Implements the gateway's side of the connections to engine replicas (see README.md)."""

import asyncio
import hmac
import secrets
from typing import Any, Protocol

from serve.engine.protocol import Finished, GenerationRequest, Take
from serve.engine.transport.errors import decode_error
from serve.engine.transport.frames import (
    TOKEN_BYTES,
    Abort,
    Address,
    Cancel,
    Failed,
    FrameProtocol,
    Generate,
    frames,
    hellos,
)
from serve.errors import EngineLost

_TOKEN_TIMEOUT_S = 5.0


class PendingRequest:
    """Tracks one request that was sent to a replica and hands its events to `take` as they arrive.

    `begun` is done with the first event, `over` after the last. Both fail with the request's error.
    """

    def __init__(self, request: GenerationRequest, take: Take) -> None:
        loop = asyncio.get_running_loop()
        self.request = request
        self.begun: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.accepted = False
        self._take = take

    def put(self, batch: list[Any]) -> None:
        if self.over.done():
            return
        last = batch[-1]
        if isinstance(last, Failed):
            self.end(decode_error(last))
            return
        self.accepted = True
        try:
            self._take(batch)
        except Exception as error:  # a bug in `take` ends its own request, not the whole connection
            self.end(error)
            return
        if not self.begun.done():
            self.begun.set_result(None)
        if isinstance(last, Finished):
            self.end(None)

    def end(self, error: BaseException | None) -> None:
        for future in (self.begun, self.over):
            if future.done():
                continue
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)
                future.exception()  # marks it as retrieved: the task that waited may be gone


class ReplicaPool(Protocol):
    """Sends requests to the replicas of one base, and is informed when these come and go."""

    def joined(self, replica: "ReplicaConnection") -> None:
        """A replica has introduced itself."""

    def left(self, replica: "ReplicaConnection") -> None:
        """A replica's connection has ended."""

    def changed(self) -> None:
        """A replica may have more capacity than before."""


class ReplicaConnection(FrameProtocol):
    """Represents one replica in a gateway: sends requests to it and distributes the events that it sends."""

    def __init__(self, listener: "ReplicaListener") -> None:
        super().__init__()
        self._listener = listener
        self._authenticated = False
        self._pool: ReplicaPool | None = None
        self._requests: dict[str, PendingRequest] = {}
        self._others = 0
        self.id = ""
        self.load_max = 0
        self.adapters: set[int] = set()
        self.draining = False

    @property
    def load(self) -> int:
        """The replica's requests: this gateway's own, and other gateways' as of its last report."""
        return len(self._requests) + self._others

    def start(self, pending: PendingRequest) -> None:
        """Sends the request to the replica."""
        request = pending.request
        self._write(Generate(request))
        self._requests[request.request_id] = pending
        if request.adapter is not None:
            self.adapters.add(request.adapter.id)

    def abort(self, request_id: str) -> bool:
        """Asks the replica to stop generating. False if it does not have the request."""
        if request_id in self._requests:
            self._write(Abort(request_id))
        return request_id in self._requests

    def release(self, pending: PendingRequest) -> None:
        """Cancels the request, unless it has ended: nobody waits for it any more."""
        request_id = pending.request.request_id
        if request_id in self._requests:
            self._write(Cancel(request_id))
            self._end(request_id)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._deadline = asyncio.get_running_loop().call_later(_TOKEN_TIMEOUT_S, transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self.lost = True
        requests, self._requests = self._requests, {}
        if self._pool is not None:
            self._pool.left(self)
        for pending in requests.values():
            pending.end(EngineLost())

    def data_received(self, data: bytes) -> None:
        if not self._authenticated:
            self._buffer += data
            if len(self._buffer) < TOKEN_BYTES:
                return
            self._authenticated = hmac.compare_digest(bytes(self._buffer[:TOKEN_BYTES]), self._listener.token)
            if not self._authenticated:
                self._transport.close()
                self._buffer.clear()
                return
            self._deadline.cancel()
            data = bytes(self._buffer[TOKEN_BYTES:])
            self._buffer.clear()
        super().data_received(data)

    def _read(self, frame: bytes) -> None:
        if self._pool is None:
            hello = hellos.decode(frame)
            self.id, self.load_max = hello.replica, hello.load_max
            self._pool = self._listener.pools[hello.base]
            self._pool.joined(self)
            return
        message = frames.decode(frame)
        if (load_report := message.load) is not None:
            self._others = load_report.others
            self.adapters = set(load_report.adapters)
            self.draining = load_report.draining
        for request_id, batch in message.entries:
            if (pending := self._requests.get(request_id)) is not None:
                pending.put(batch)
                if pending.over.done():
                    self._end(request_id)
        if load_report is not None:
            self._pool.changed()

    def _end(self, request_id: str) -> None:
        del self._requests[request_id]
        if self._pool is not None:
            self._pool.changed()


class ReplicaListener:
    """Listens for the connections that replicas open to this gateway. `pools` holds a pool for each base."""

    def __init__(self, host: str) -> None:
        self.pools: dict[str, ReplicaPool] = {}
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._host = host
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def address(self) -> Address:
        """Returns where replicas connect. The first call starts to listen."""
        async with self._starting:
            if self._server is None:
                loop = asyncio.get_running_loop()
                self._server = await loop.create_server(lambda: ReplicaConnection(self), self._host, 0)
        return Address(self._host, self._server.sockets[0].getsockname()[1], self.token)
