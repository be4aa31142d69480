"""How events come from engine replicas to gateways: one connection for each pair, for all requests.

Ray carries a request to its replica, counts it there and tells when the replica is gone. What is generated
comes by a TCP connection, which the replica opens to the gateway that sent the request: one frame for each
step of the engine, with the events of every request of that gateway. An item of a Ray stream costs 0.3 ms
of CPU at both ends together; a frame a tenth, shared by all who are in the step (docs/performance.md).

A connection begins with the gateway's token, which only its requests carry. A frame is its length (4 bytes,
big endian) and msgpack: a list of (request id, events). No events are a request's last word.
"""

import asyncio
import contextlib
import hmac
import logging
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import msgspec

from serve.engine.base import Event, Finished, Take

log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">I")
_FRAME_BYTES_MAX = 256 << 20
_TOKEN_BYTES = 32
_TOKEN_TIMEOUT_S = 5.0

Entry = tuple[str, list[Event]]
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(list[Entry])


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway takes events, and the token that it takes them for."""

    host: str
    port: int
    token: bytes


class Arrivals:
    """What comes for one request, handed to `take` as it comes."""

    def __init__(self, take: Take) -> None:
        loop = asyncio.get_running_loop()
        self.connection: _Incoming | None = None
        self.begun: asyncio.Future[None] = loop.create_future()
        self.over: asyncio.Future[None] = loop.create_future()
        self.finished = False
        self._take = take
        self._last_word = asyncio.Event()

    def put(self, batch: list[Event], connection: "_Incoming") -> None:
        self.connection = connection
        if not batch:
            self._last_word.set()
            return
        if self.over.done():
            return
        try:
            self._take(batch)
        except Exception as error:  # a bug of the reader's ends its request, not everybody's connection
            self.fail(error)
            return
        if not self.begun.done():
            self.begun.set_result(None)
        if isinstance(batch[-1], Finished):
            self.finished = True
            self.over.set_result(None)

    def fail(self, error: BaseException) -> None:
        """Nothing more is wanted, or can come."""
        if not self.over.done():
            self.over.set_exception(error)
            self.over.exception()  # retrieved: whoever waited may be gone

    async def complete(self, timeout_s: float) -> None:
        """Wait until nothing more can come: the last word, or the connection's end."""
        waits = [asyncio.ensure_future(self._last_word.wait())]
        if self.connection is not None:
            waits.append(asyncio.ensure_future(self.connection.closed.wait()))
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()


class Inbox:
    """A gateway's end: every replica's events, given to the requests that wait for them."""

    def __init__(self, host: str) -> None:
        self.waiting: dict[str, Arrivals] = {}
        self.token = secrets.token_bytes(_TOKEN_BYTES)
        self._host = host
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    async def address(self) -> Address:
        """Listens from the first call on."""
        if self._server is None:
            async with self._starting:
                if self._server is None:
                    loop = asyncio.get_running_loop()
                    self._server = await loop.create_server(lambda: _Incoming(self), self._host, 0)
        return Address(self._host, self._server.sockets[0].getsockname()[1], self.token)

    @contextlib.contextmanager
    def expecting(self, request_id: str, take: Take) -> Iterator[Arrivals]:
        arrivals = self.waiting[request_id] = Arrivals(take)
        try:
            yield arrivals
        finally:
            del self.waiting[request_id]


class _Incoming(asyncio.Protocol):
    """One replica's connection."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._known = False
        self._buffer = bytearray()
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._deadline = asyncio.get_running_loop().call_later(_TOKEN_TIMEOUT_S, transport.close)

    def connection_lost(self, error: Exception | None) -> None:
        self._deadline.cancel()
        self.closed.set()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._known and not self._introduced():
            return
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            if length > _FRAME_BYTES_MAX:
                log.error("a replica sent a frame of %d bytes", length)
                self._transport.close()
                return
            end = at + _LENGTH.size + length
            if end > len(self._buffer):
                break
            self._give(bytes(self._buffer[at + _LENGTH.size : end]))
            at = end
        del self._buffer[:at]

    def _introduced(self) -> bool:
        if len(self._buffer) < _TOKEN_BYTES:
            return False
        self._known = hmac.compare_digest(bytes(self._buffer[:_TOKEN_BYTES]), self._inbox.token)
        del self._buffer[:_TOKEN_BYTES]
        if not self._known:
            self._transport.close()
            return False
        self._deadline.cancel()
        return True

    def _give(self, frame: bytes) -> None:
        for request_id, batch in _decoder.decode(frame):
            if (arrivals := self._inbox.waiting.get(request_id)) is not None:
                arrivals.put(batch, self)


class Line(asyncio.Protocol):
    """A replica's end of the connection to one gateway."""

    def __init__(self) -> None:
        self.lost = False
        self._entries: list[Entry] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._loop = asyncio.get_running_loop()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True

    def send(self, request_id: str, batch: list[Event]) -> None:
        """On its way once every request of the engine's step has had its turn. Raises ConnectionError."""
        if self.lost:
            raise ConnectionError("the gateway is gone")
        if not self._entries:
            # All whom the step woke are due before what is scheduled now.
            self._loop.call_soon(self._flush)
        self._entries.append((request_id, batch))

    def close(self) -> None:
        """After everything that has been sent."""
        self._loop.call_soon(self._transport.close)

    def _flush(self) -> None:
        frame = _encoder.encode(self._entries)
        self._entries.clear()
        self._transport.write(_LENGTH.pack(len(frame)) + frame)


class Lines:
    """A replica's connections, one to each gateway that sends it requests."""

    def __init__(self) -> None:
        self._lines: dict[Address, asyncio.Task[Line]] = {}

    async def to(self, address: Address) -> Line:
        """Raises OSError if the gateway cannot be reached."""
        task = self._lines.get(address)
        if task is None or (task.done() and task.result().lost):
            for gone in [old for old, one in self._lines.items() if one.done() and one.result().lost]:
                del self._lines[gone]
            task = self._lines[address] = asyncio.create_task(self._connect(address))
        return await asyncio.shield(task)

    async def _connect(self, address: Address) -> Line:
        try:
            transport, line = await asyncio.get_running_loop().create_connection(
                Line, address.host, address.port
            )
        except OSError:
            del self._lines[address]
            raise
        transport.write(address.token)
        return line
