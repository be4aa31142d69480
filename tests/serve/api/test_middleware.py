"""Invariant 10 in the middleware: headers and bodies are bounded before a route reads them."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi import FastAPI, Request

from serve.api import errors
from serve.api.middleware import HEADER_BYTES_MAX, BodyMiddleware, RequestMiddleware
from serve.observability.metrics import Metrics

MOST = 10_000


def app(body_timeout_s: float = 5) -> FastAPI:
    echo_app = FastAPI()

    @echo_app.post("/echo")
    async def echo(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    errors.install(echo_app)
    slowest = MOST / body_timeout_s
    echo_app.add_middleware(BodyMiddleware, body_bytes_max=lambda _scope: MOST, bytes_per_s_min=slowest)
    echo_app.add_middleware(RequestMiddleware, metrics=Metrics(), body_bytes_max=MOST)
    return echo_app


def post(content: bytes | AsyncIterator[bytes], body_timeout_s: float = 5, **headers: str) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app(body_timeout_s))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.post("/echo", content=content, headers=headers)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (b"x" * 5000, "identity"),
        (gzip.compress(b"x" * 5000), "gzip"),
        (gzip.compress(b"x" * 5000), "GZIP"),
        (zlib.compress(b"x" * 5000), "deflate"),
    ],
    ids=["plain", "gzip", "capitals", "deflate"],
)
def test_a_body_may_be_compressed(content: bytes, encoding: str) -> None:
    assert post(content, **{"content-encoding": encoding}).json() == {"bytes": 5000}


def test_a_compressed_body_may_come_in_pieces() -> None:
    compressed = gzip.compress(bytes(range(256)) * 20)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(compressed), 7):
            yield compressed[start : start + 7]

    assert post(pieces(), **{"content-encoding": "gzip"}).json() == {"bytes": 5120}


@pytest.mark.parametrize("size", [MOST + 1, 50_000_000])
def test_a_body_that_is_too_large_once_it_is_decompressed_is_refused(size: int) -> None:
    answer = post(gzip.compress(b"\0" * size), **{"content-encoding": "gzip"})
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(b"x" * 5000)[:-9], b""], ids=["other", "cut", "empty"]
)
def test_a_body_that_is_not_what_its_encoding_says_is_refused(content: bytes) -> None:
    assert post(content, **{"content-encoding": "gzip"}).status_code == 400


def test_an_encoding_that_is_not_known_is_refused_by_name() -> None:
    answer = post(b"x", **{"content-encoding": "br"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert "'br'" in answer.json()["error"]["message"]


def test_headers_have_a_bound() -> None:
    answer = post(b"x", **{"x-large": "x" * HEADER_BYTES_MAX})
    assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    async def slowly() -> list[dict[str, object]]:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            await asyncio.sleep(0.05)  # a byte now and then, for ever
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST"},
            **{"scheme": "http", "path": "/echo", "raw_path": b"/echo", "query_string": b"", "headers": []},
            **{"server": ("here", 80), "client": ("here", 1), "root_path": ""},
        }
        await app(body_timeout_s=0.2)(scope, receive, send)  # type: ignore[arg-type]
        return sent

    start, body = asyncio.run(slowly())[:2]
    assert start["status"] == 408
    assert json.loads(body["body"])["error"]["code"] == "request_timeout"  # type: ignore[arg-type]
