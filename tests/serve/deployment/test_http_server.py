"""Checks a gateway's own HTTP server with clients that do not read their answers."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from contextlib import closing
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from serve.deployment import upstream
from serve.deployment.http_server import HttpServer
from tests.support.ports import free_port

HOST = "127.0.0.1"


async def endless(scope: Scope, receive: Receive, send: Send) -> None:
    """Sends as fast as the client reads, until it is gone."""
    if scope["type"] == "lifespan":
        while True:
            kind = (await receive())["type"]
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    left = asyncio.create_task(receive_end(receive))
    while not left.done():
        await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
        await asyncio.sleep(0)


async def receive_end(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def serving(scenario: Callable[[HttpServer, int], Coroutine[Any, Any, None]], drain_timeout_s: float) -> None:
    async def run() -> None:
        port = free_port()
        server = HttpServer(endless, HOST, port, drain_timeout_s=drain_timeout_s)
        await server.start()
        try:
            await asyncio.wait_for(scenario(server, port), 30)
        finally:
            await asyncio.wait_for(server.stop(), 10)

    asyncio.run(run())


def ask(port: int) -> socket.socket:
    client = socket.create_connection((HOST, port))
    client.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
    return client


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_a_client_that_reads_no_more_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "STALLED_S", 0.3)

    async def scenario(server: HttpServer, port: int) -> None:
        with closing(ask(port)):
            await until(lambda: server.ongoing == 1)
            await until(lambda: server.ongoing == 0)

    serving(scenario, 60)


def test_a_client_that_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "STALLED_S", 0.2)

    async def scenario(server: HttpServer, port: int) -> None:
        with closing(ask(port)) as client:
            client.setblocking(False)
            loop, end_s = asyncio.get_running_loop(), asyncio.get_running_loop().time() + 1.5
            while loop.time() < end_s:
                assert await loop.sock_recv(client, 1 << 20)
                await asyncio.sleep(0.05)
            assert server.ongoing == 1

    serving(scenario, 1)


def test_a_client_that_reads_no_more_holds_up_no_shutdown() -> None:
    async def scenario(server: HttpServer, port: int) -> None:
        client = ask(port)
        await until(lambda: server.ongoing == 1)
        await asyncio.wait_for(server.stop(), 10)
        assert server.ongoing == 0
        client.close()

    serving(scenario, 2)
