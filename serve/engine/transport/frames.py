"""How requests get to engine replicas and events back: one connection for each gateway and replica.

Ray Serve starts, watches, scales and ends replicas, and introduces gateways to them (`Desk.meet`). From
then on nothing of a request passes through Ray: a gateway writes it to the connection (`inbox.py`), and the
replica (`desk.py`) answers with one frame for each step of its engine, with the events of all requests of
that gateway. The end of a connection is the end of a process, and is known at once on the other side. What a
Ray call costs instead: docs/performance.md.

A connection is opened by the replica and begins with the gateway's token, which only Ray's calls carry. A
frame is its length (4 bytes, big endian) and msgpack: Generate, Abort and Cancel to the replica, a Hello
and then Frames from it.
"""

import asyncio
import logging
import struct
from dataclasses import dataclass
from typing import cast

import msgspec

from serve.engine.protocol import Accepted, Delta, Finished, GenerationRequest

log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">I")
_FRAME_BYTES_MAX = 256 << 20
TOKEN_BYTES = 32


@dataclass(frozen=True, slots=True)
class Address:
    """Where a gateway takes connections, and the token that it takes them for."""

    host: str
    port: int
    token: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """Ends a request with an error of `serve.errors`: its type's name and its constructor's arguments."""

    name: str
    arguments: tuple[str | int | float | bool | None, ...]


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="g"):
    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    request_id: str


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """As Abort, but nobody waits for the request's end, and it may not have begun."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, array_like=True):
    base: str
    replica: str
    load_max: int


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """What routing goes by: requests of other gateways, adapters in memory, whether it is about to end."""

    others: int
    adapters: list[int]
    draining: bool


Entry = tuple[str, list[Accepted | Delta | Finished | Failed]]


class Frame(msgspec.Struct, frozen=True, array_like=True):
    entries: list[Entry]
    load: LoadReport | None = None


_encode = msgspec.msgpack.Encoder().encode
commands = msgspec.msgpack.Decoder(Generate | Abort | Cancel)
hellos = msgspec.msgpack.Decoder(Hello)
frames = msgspec.msgpack.Decoder(Frame)


class FrameProtocol(asyncio.Protocol):
    """Bytes to frames and back."""

    def __init__(self) -> None:
        self.lost = False
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        at = 0
        while len(self._buffer) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, at)
            end = at + _LENGTH.size + length
            if length > _FRAME_BYTES_MAX:
                log.error("a frame of %d bytes was announced", length)
                self._transport.close()
                return
            if end > len(self._buffer):
                break
            frame = bytes(self._buffer[at + _LENGTH.size : end])
            at = end
            try:
                self._read(frame)
            except Exception:
                log.exception("a frame could not be read")
                self._transport.close()
                return
        del self._buffer[:at]

    def _read(self, frame: bytes) -> None:
        raise NotImplementedError

    def _write(self, message: msgspec.Struct) -> None:
        frame = _encode(message)
        self._transport.write(_LENGTH.pack(len(frame)) + frame)
