"""Sends chat completions and reads their event streams with as little CPU as it can.

The servers under test share its cores. So it takes one time stamp per read, and decodes only the first
events and the one with the usage as JSON; other events are recognised by their bytes. A connection
carries one request at a time and is reused for the next one.
"""

import asyncio
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

import httptools

from loadtests.bench.workload import Workload, bodies
from loadtests.peers.server import Server

ERROR_BYTES_MAX = 2000
TIMEOUT_S = 300.0


@dataclass(slots=True)
class StreamResult:
    """Holds what one streamed request returned. Times are `time.perf_counter()`."""

    sent_s: float
    status: int = 0
    stamps_s: list[float] = field(default_factory=list)  # arrival of each event with text
    ended_s: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200 and not self.error and bool(self.stamps_s) and self.completion_tokens > 0

    @property
    def ttft_s(self) -> float:
        return self.stamps_s[0] - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Gives the times between successive events with text; events of one read are 0 apart."""
        return [after - before for before, after in zip(self.stamps_s, self.stamps_s[1:], strict=False)]


def encode_request(url: str, key: str, body: Mapping[str, object]) -> bytes:
    """Returns the request's bytes. Encoded beforehand, it costs nothing while the clock runs."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def encode_turn(server: Server, workload: Workload, batch: int, ends: tuple[int, ...] = ()) -> list[bytes]:
    """Returns the bytes of all requests of one turn. Another `batch` has other prompts."""
    return [
        encode_request(server.url, server.key, body) for body in bodies(workload, server.models, batch, ends)
    ]


class Connection(asyncio.Protocol):
    """Carries one request at a time; httptools calls its `on_…` methods while it parses a read."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._now_s = 0.0
        self._rest = b""
        self._result = StreamResult(0.0)
        self._ended: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, request: bytes) -> StreamResult:
        """Sends a request and reads its stream to the end. A broken connection is a result with an error."""
        assert self._transport is not None
        self._rest, self._ended = b"", asyncio.get_running_loop().create_future()
        result = self._result = StreamResult(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._ended
        except (ConnectionError, TimeoutError) as error:
            result.error = result.error or repr(error)
            self.close()
        result.ended_s = time.perf_counter()
        return result

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError(f"the server closed the connection: {error!r}"))

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._result.error = repr(error)
            self.close()

    def on_headers_complete(self) -> None:
        self._result.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._result.status != 200:
            self._result.error = (self._result.error + body.decode(errors="replace"))[:ERROR_BYTES_MAX]
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            self._read_event(event)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _read_event(self, event: bytes) -> None:
        result = self._result
        if result.stamps_s and b'"content":' in event:
            if b'"content":""' not in event:
                result.stamps_s.append(self._now_s)
            if b'"usage":{' not in event:
                return
        elif result.stamps_s and b'"usage"' not in event and b'"error"' not in event:
            return
        if not event.startswith(b"data: {"):
            return
        data = json.loads(event[6:])
        if data.get("error"):
            result.error = json.dumps(data["error"])[:ERROR_BYTES_MAX]
        if usage := data.get("usage"):
            result.prompt_tokens = usage["prompt_tokens"]
            result.completion_tokens = usage["completion_tokens"]
        choices = data.get("choices")
        if not result.stamps_s and choices and choices[0]["delta"].get("content"):
            result.stamps_s.append(self._now_s)


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection, parts.hostname, parts.port, family=socket.AF_INET
    )
    return connection


class ConnectionPool:
    """Keeps connections to one server: as many as were ever needed at once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: list[Connection] = []

    async def send(self, request: bytes) -> StreamResult:
        """Sends on a free connection, or on a new one. A refused connection is a result with an error."""
        connection = self._free.pop() if self._free else None
        try:
            if connection is None or not connection.open:
                connection = await connect(self._url)
        except OSError as error:
            now_s = time.perf_counter()
            return StreamResult(now_s, ended_s=now_s, error=repr(error))
        result = await connection.send(request)
        if connection.open:
            self._free.append(connection)
        return result

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()
