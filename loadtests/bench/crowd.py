"""Clients that only take up room: idle keep-alive connections, and readers of a byte at a time."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from loadtests.bench.connection import Connection, connect, encoded
from loadtests.bench.work import body, prompt
from loadtests.peers.server import Server

RECEIVE_BYTES = 4096  # a slow reader's receive buffer, so that the server has to keep the rest
EVERY_S = 0.1
AT_ONCE = 32  # that are being connected
IDLE_TOKENS, SLOW_TOKENS = 1, 128
OK = b"HTTP/1.1 200"


class Crowd:
    def __init__(self, server: Server) -> None:
        self.refusals: list[str] = []
        self._server = server
        self._idle: list[Connection] = []
        self._slow: list[socket.socket] = []
        self._room = asyncio.Semaphore(AT_ONCE)

    def standing(self) -> dict[str, int]:
        """How many are there at this moment, and how many never were."""
        idle = sum(connection.open for connection in self._idle)
        return {"idle": idle, "slow_readers": len(self._slow), "refused": len(self.refusals)}

    async def gather(self, idle: int, slow: int) -> None:
        await asyncio.gather(*(self._connect(number) for number in range(idle)))
        await asyncio.gather(*(self._begin(number) for number in range(slow)))

    async def read(self) -> None:
        """A byte from each slow reader every 0.1 s; one task for all, to leave the cores to the others."""
        while True:
            self._slow = [reader for reader in self._slow if _read_on(reader)]
            await asyncio.sleep(EVERY_S)

    def leave(self) -> None:
        for connection in self._idle:
            connection.close()
        for reader in self._slow:
            reader.close()

    async def _connect(self, number: int) -> None:
        """Kept after an answer, as a client's pool keeps them."""
        async with self._room:
            connection = await connect(self._server.url)
            answer = await connection.ask(self._request(7000, number, IDLE_TOKENS))
        if answer.ok:
            self._idle.append(connection)
        else:
            self.refusals.append(f"{answer.status} {answer.error[:200]}")

    async def _begin(self, number: int) -> None:
        parts, loop = urlsplit(self._server.url), asyncio.get_running_loop()
        reader, head = socket.socket(), b""
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        reader.setblocking(False)
        async with self._room:
            with contextlib.suppress(OSError):
                await loop.sock_connect(reader, (parts.hostname, parts.port))
                await loop.sock_sendall(reader, self._request(7001, number, SLOW_TOKENS))
                head = await loop.sock_recv(reader, len(OK))
        if head == OK:
            self._slow.append(reader)
        else:
            self.refusals.append(head.decode(errors="replace") or "no answer")
            reader.close()

    def _request(self, batch: int, number: int, tokens: int) -> bytes:
        asked = body(self._server.model, prompt(batch, number), tokens=tokens)
        return encoded(self._server.url, self._server.key, asked)


def _read_on(reader: socket.socket) -> bool:
    """Whether it is still connected."""
    try:
        return bool(reader.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


@asynccontextmanager
async def crowd(server: Server, idle: int, slow: int) -> AsyncIterator[Crowd]:
    """Complete when it is yielded; the readers read until it is left."""
    others = Crowd(server)
    reading = asyncio.create_task(others.read())
    try:
        await others.gather(idle, slow)
        yield others
    finally:
        reading.cancel()
        others.leave()
