"""The bench's client counts tokens and stamps events; a scripted server of a few lines answers it."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence

import pytest

from loadtests.bench.connection import ConnectionPool, StreamResult, encode_request
from loadtests.bench.load_generator import TurnResult, blocks_in_turn, closed_loop, open_loop, run_on_uvloop

PAUSE_S = 0.02


def event(content: str | None, **more: object) -> bytes:
    delta = {} if content is None else {"content": content}
    data = {"choices": [{"index": 0, "delta": delta}], **more}
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}\n\n'
DONE = b"data: [DONE]\n\n"


class ScriptedServer:
    """Answers each request with `parts`, a pause between them, in the order of its connection."""

    def __init__(self, parts: Sequence[bytes], *, status: str = "200 OK", length: int | None = None) -> None:
        self.connections = self.requests = 0
        self._parts, self._status, self._length = parts, status, length

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0]))
                self.requests += 1
                writer.write(f"HTTP/1.1 {self._status}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
                for part in self._parts:
                    writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(PAUSE_S)
                if self._length is not None:
                    return
                writer.write(b"0\r\n\r\n")
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def requests_to(url: str, count: int = 1) -> list[bytes]:
    return [encode_request(url, "key", {"model": "m", "n": n}) for n in range(count)]


def send(server: ScriptedServer, count: int = 1, streams: int = 1) -> TurnResult:
    async def go() -> TurnResult:
        async with server as url:
            return await closed_loop(url, requests_to(url, count), streams)

    return run_on_uvloop(go)


def test_tokens_come_from_the_usage_and_gaps_from_when_events_arrived():
    server = ScriptedServer([ROLE, event("a"), event("b"), event("c") + event(None), USAGE + DONE])
    (result,) = send(server).results
    assert result.ok
    assert (result.prompt_tokens, result.completion_tokens) == (7, 3)
    assert len(result.stamps_s) == 3
    assert all(gap >= PAUSE_S / 2 for gap in result.gaps_s)
    assert result.ttft_s >= PAUSE_S / 2  # the role alone is no token


def test_an_event_that_is_cut_anywhere_counts_once():
    whole = ROLE + event("a") + event("b") + USAGE + DONE
    for at in range(1, len(whole), 41):
        (result,) = send(ScriptedServer([whole[:at], whole[at:]])).results
        assert result.ok
        assert len(result.stamps_s) == 2


def test_events_that_arrive_together_have_no_gap():
    (result,) = send(ScriptedServer([event("a") + event("b") + event("c"), USAGE])).results
    assert result.gaps_s == [0.0, 0.0]


def test_a_text_that_looks_like_usage_is_not_counted_as_such():
    (result,) = send(ScriptedServer([event("a"), event('"usage":{"error":{'), USAGE + DONE])).results
    assert (result.ok, result.completion_tokens, len(result.stamps_s)) == (True, 3, 2)


def test_usage_beside_the_last_text_is_seen():
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    (result,) = send(ScriptedServer([event("a"), event("b", usage=usage), DONE])).results
    assert (result.prompt_tokens, result.completion_tokens, len(result.stamps_s)) == (5, 2, 2)


def test_a_refusal_an_error_within_a_stream_and_a_broken_connection_are_failures():
    refused = ScriptedServer([b'{"error": {"message": "no credit"}}'], status="402 Payment Required")
    broken = ScriptedServer([event("a")], length=10)
    failed = ScriptedServer([event("a"), b'data: {"error":{"message":"engine lost"}}\n\n', DONE])
    for server, text in ((refused, "no credit"), (broken, "closed"), (failed, "engine lost")):
        (result,) = send(server).results
        assert not result.ok
        assert text in result.error


def test_a_server_that_is_not_there_is_a_failure_too():
    async def go() -> TurnResult:
        async with ScriptedServer([]) as url:
            pass
        return await closed_loop(url, requests_to(url), 1)

    (result,) = run_on_uvloop(go).results
    assert not result.ok
    assert "rror" in result.error


def test_streams_keep_their_connections():
    server = ScriptedServer([event("a"), USAGE + DONE])
    turn = send(server, count=12, streams=3)
    assert (server.requests, len(turn.results)) == (12, 12)
    assert server.connections <= 3


def test_open_loop_does_not_wait_for_answers():
    async def go() -> TurnResult:
        async with ScriptedServer([event("a")] * 10 + [USAGE + DONE]) as url:
            return await open_loop(url, requests_to(url, 20), per_s=200, seed=1)

    turn = run_on_uvloop(go)
    assert all(result.ok for result in turn.results)
    assert turn.wall_s < 10 * 11 * PAUSE_S  # one after the other they would take 20 × 11 pauses


def test_blocks_go_to_each_server_in_turn_and_the_first_of_each_is_left_out():
    one, two = ScriptedServer([event("a"), USAGE]), ScriptedServer([event("b"), USAGE])

    async def go() -> list[list[StreamResult]]:
        async with one as first, two as second:
            urls = (first, second)
            return await blocks_in_turn(urls, [requests_to(url, 6) for url in urls], block=3, quiet_s=0.01)

    data = run_on_uvloop(go)
    assert [len(results) for results in data] == [4, 4]
    assert (one.requests, two.requests) == (6, 6)
    sent = sorted((result.sent_s, server) for server, results in enumerate(data) for result in results)
    assert [server for _, server in sent] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_sigterm_ends_a_run_even_within_a_callback_and_the_handler_from_before_is_back():
    before = signal.getsignal(signal.SIGTERM)

    async def go() -> TurnResult:
        asyncio.get_running_loop().call_later(PAUSE_S, os.kill, os.getpid(), signal.SIGTERM)
        async with ScriptedServer([event("a")] * 1000) as url:
            return await closed_loop(url, requests_to(url), 1)

    with pytest.raises(SystemExit):
        run_on_uvloop(go)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_pool_connects_again_when_the_server_has_closed():
    server = ScriptedServer([event("a"), USAGE], length=10)

    async def go() -> None:
        async with server as url:
            pool = ConnectionPool(url)
            for request in requests_to(url, 3):
                await pool.send(request)

    run_on_uvloop(go)
    assert server.connections == 3
