"""Holds connections that do next to nothing: idle keep-alive ones, and readers of a byte at a time."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from loadtests.bench.connection import Connection, connect, encode_request
from loadtests.bench.workload import body, prompt
from loadtests.peers.server import Server

RECEIVE_BYTES = 4096  # a slow reader's receive buffer: so small that the server must hold the rest
READ_EVERY_S = 0.1
CONNECTING_MAX = 32  # connections that are opened at the same time
IDLE_TOKENS, SLOW_TOKENS = 1, 128
OK = b"HTTP/1.1 200"


class IdleClients:
    """Opens idle connections and slow readers, and counts those that are still open."""

    def __init__(self, server: Server) -> None:
        self.refusals: list[str] = []
        self._server = server
        self._idle: list[Connection] = []
        self._slow: list[socket.socket] = []
        self._connecting = asyncio.Semaphore(CONNECTING_MAX)

    def counts(self) -> dict[str, int]:
        """Returns how many are connected now, and how many were refused."""
        idle = sum(connection.open for connection in self._idle)
        return {"idle": idle, "slow_readers": len(self._slow), "refused": len(self.refusals)}

    async def connect_all(self, idle: int, slow: int) -> None:
        await asyncio.gather(*(self._open_idle(number) for number in range(idle)))
        await asyncio.gather(*(self._open_slow(number) for number in range(slow)))

    async def read_slowly(self) -> None:
        """Reads a byte of each slow stream every READ_EVERY_S. One task serves all, which costs less CPU."""
        while True:
            self._slow = [reader for reader in self._slow if _read_byte(reader)]
            await asyncio.sleep(READ_EVERY_S)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        for reader in self._slow:
            reader.close()

    async def _open_idle(self, number: int) -> None:
        """Keeps a connection after one answer, as a client's pool does."""
        async with self._connecting:
            connection = await connect(self._server.url)
            result = await connection.send(self._request(7000, number, IDLE_TOKENS))
        if result.ok:
            self._idle.append(connection)
        else:
            self.refusals.append(f"{result.status} {result.error[:200]}")

    async def _open_slow(self, number: int) -> None:
        parts, loop = urlsplit(self._server.url), asyncio.get_running_loop()
        reader, head = socket.socket(), b""
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        reader.setblocking(False)
        async with self._connecting:
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
        fields = body(self._server.model, prompt(batch, number), tokens=tokens)
        return encode_request(self._server.url, self._server.key, fields)


def _read_byte(reader: socket.socket) -> bool:
    """Reads a byte if there is one. Returns whether the connection is still open."""
    try:
        return bool(reader.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


@asynccontextmanager
async def idle_clients(server: Server, idle: int, slow: int) -> AsyncIterator[IdleClients]:
    """Yields when all are connected. They read until the block ends, and are closed then."""
    clients = IdleClients(server)
    reading = asyncio.create_task(clients.read_slowly())
    try:
        await clients.connect_all(idle, slow)
        yield clients
    finally:
        reading.cancel()
        clients.close()
