"""An HTTP/1.1 client for event streams that leaves the cores to the servers.

It stamps every read once, and decodes only the first events and the one with the usage as JSON; all other
events are counted where they lie. A connection takes one request at a time and is kept for the next one.
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

from loadtests.bench.work import Work, bodies
from loadtests.peers.server import Server

ERROR_BYTES_MAX = 2000
TIMEOUT_S = 300.0


@dataclass(slots=True)
class Answer:
    """What came back for one streamed request; times are `time.perf_counter()`."""

    sent_s: float
    status: int = 0
    stamps_s: list[float] = field(default_factory=list)  # of each event with text
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
        """Between successive events with text; those that came in one read are 0 apart."""
        return [after - before for before, after in zip(self.stamps_s, self.stamps_s[1:], strict=False)]


def encoded(url: str, key: str, body: Mapping[str, object]) -> bytes:
    """The request's bytes, so that nothing is encoded while the clock runs."""
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
        f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def requests_of(server: Server, work: Work, batch: int, ends: tuple[int, ...] = ()) -> list[bytes]:
    """One turn of `work` for `server`: all its requests' bytes. Another `batch` is other prompts."""
    return [encoded(server.url, server.key, body) for body in bodies(work, server.models, batch, ends)]


class Connection(asyncio.Protocol):
    """One connection; httptools calls its `on_…` methods while it reads what has arrived."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._now_s = 0.0
        self._rest = b""
        self._answer = Answer(0.0)
        self._ended: asyncio.Future[None] | None = None

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> Answer:
        """Send and read to the end. A connection that breaks is an answer with an error, no exception."""
        assert self._transport is not None
        self._rest, self._ended = b"", asyncio.get_running_loop().create_future()
        answer = self._answer = Answer(time.perf_counter())
        self._transport.write(request)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._ended
        except (ConnectionError, TimeoutError) as error:
            answer.error = answer.error or repr(error)
            self.close()
        answer.ended_s = time.perf_counter()
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(ConnectionError(f"the server closed the connection: {error!r}"))

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer.error = repr(error)
            self.close()

    def on_headers_complete(self) -> None:
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._answer.status != 200:
            self._answer.error = (self._answer.error + body.decode(errors="replace"))[:ERROR_BYTES_MAX]
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            self._take(event)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)

    def _take(self, event: bytes) -> None:
        answer = self._answer
        if answer.stamps_s and b'"content":' in event:
            if b'"content":""' not in event:
                answer.stamps_s.append(self._now_s)
            if b'"usage":{' not in event:
                return
        elif answer.stamps_s and b'"usage"' not in event and b'"error"' not in event:
            return
        if not event.startswith(b"data: {"):
            return
        told = json.loads(event[6:])
        if told.get("error"):
            answer.error = json.dumps(told["error"])[:ERROR_BYTES_MAX]
        if usage := told.get("usage"):
            answer.prompt_tokens = usage["prompt_tokens"]
            answer.completion_tokens = usage["completion_tokens"]
        choices = told.get("choices")
        if not answer.stamps_s and choices and choices[0]["delta"].get("content"):
            answer.stamps_s.append(self._now_s)


async def connect(url: str) -> Connection:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    _, connection = await asyncio.get_running_loop().create_connection(
        Connection, parts.hostname, parts.port, family=socket.AF_INET
    )
    return connection


class Pool:
    """Kept connections to one server: as many as were ever needed at once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._free: list[Connection] = []

    async def ask(self, request: bytes) -> Answer:
        connection = self._free.pop() if self._free else None
        try:
            if connection is None or not connection.open:
                connection = await connect(self._url)
        except OSError as error:
            now_s = time.perf_counter()
            return Answer(now_s, ended_s=now_s, error=repr(error))
        answer = await connection.ask(request)
        if connection.open:
            self._free.append(connection)
        return answer

    def close(self) -> None:
        for connection in self._free:
            connection.close()
        self._free.clear()
