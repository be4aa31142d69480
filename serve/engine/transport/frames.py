"""Defines the frames between a gateway and an engine replica, and turns bytes into frames and back.

A frame is its length (4 bytes, big endian) and msgpack. A connection is opened by the replica and begins with
the gateway's token, which only Ray's calls carry. Then the replica sends a Hello and Frames, and the gateway
sends Generate, Abort and Cancel. README.md tells the protocol in plain words. docs/performance.md has the
cost of a call through Ray instead.
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
    """Names where a gateway listens for replicas, and the token that a replica must present."""

    host: str
    port: int
    token: bytes


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="x"):
    """Ends a request with an error of `serve.errors`: its type's name and its constructor's arguments."""

    name: str
    arguments: tuple[str | int | float | bool | None, ...]


class Generate(msgspec.Struct, frozen=True, array_like=True, tag="g"):
    """Starts a request on the replica."""

    request: GenerationRequest


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="a"):
    """Stops a request's generation. The replica still sends its Finished."""

    request_id: str


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="c"):
    """Drops a request, which may not have begun. The replica sends nothing more of it."""

    request_id: str


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """Introduces a replica: the first frame after the token. `load_max` is how many requests it takes."""

    base: str
    replica: str
    load_max: int


class LoadReport(msgspec.Struct, frozen=True, array_like=True):
    """Tells a gateway what its router needs to know of a replica.

    `others` counts requests of other gateways, `adapters` are ids in memory, `draining` means it will end.
    """

    others: int
    adapters: list[int]
    draining: bool


Entry = tuple[str, list[Accepted | Delta | Finished | Failed]]


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Holds the events of one engine step for all requests of one gateway, or a load report."""

    entries: list[Entry]
    load: LoadReport | None = None


_encode = msgspec.msgpack.Encoder().encode
commands = msgspec.msgpack.Decoder(Generate | Abort | Cancel)
hellos = msgspec.msgpack.Decoder(Hello)
frames = msgspec.msgpack.Decoder(Frame)


class FrameProtocol(asyncio.Protocol):
    """Cuts a connection's bytes into frames and writes messages as frames.

    A frame that is too long or cannot be read closes the connection.
    """

    def __init__(self) -> None:
        self.lost = False
        self._buffer = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        offset = 0
        while len(self._buffer) - offset >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, offset)
            end = offset + _LENGTH.size + length
            if length > _FRAME_BYTES_MAX:
                log.error("a frame of %d bytes was announced", length)
                self._transport.close()
                return
            if end > len(self._buffer):
                break
            frame = bytes(self._buffer[offset + _LENGTH.size : end])
            offset = end
            try:
                self._read(frame)
            except Exception:
                log.exception("a frame could not be read")
                self._transport.close()
                return
        del self._buffer[:offset]

    def _read(self, frame: bytes) -> None:
        raise NotImplementedError

    def _write(self, message: msgspec.Struct) -> None:
        frame = _encode(message)
        self._transport.write(_LENGTH.pack(len(frame)) + frame)
