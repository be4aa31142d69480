"""The load generator's client against a server of a few lines: what it counts and when it stamps."""

import asyncio
import json
import os
import signal
from collections.abc import Sequence

import pytest

from loadtests.bench.connection import Answer, Pool, encoded
from loadtests.bench.load import Run, alternating, closed, opened, run

PAUSE_S = 0.02


def event(content: str | None, **more: object) -> bytes:
    delta = {} if content is None else {"content": content}
    told = {"choices": [{"index": 0, "delta": delta}], **more}
    return b"data: " + json.dumps(told, separators=(",", ":")).encode() + b"\n\n"


USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3,"total_tokens":10}}\n\n'
ROLE = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}\n\n'
DONE = b"data: [DONE]\n\n"


class Speaker:
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


def asked(url: str, count: int = 1) -> list[bytes]:
    return [encoded(url, "key", {"model": "m", "n": n}) for n in range(count)]


def answers(speaker: Speaker, count: int = 1, streams: int = 1) -> Run:
    async def go() -> Run:
        async with speaker as url:
            return await closed(url, asked(url, count), streams)

    return run(go)


def test_tokens_come_from_the_usage_and_gaps_from_when_events_arrived():
    speaker = Speaker([ROLE, event("a"), event("b"), event("c") + event(None), USAGE + DONE])
    (answer,) = answers(speaker).answers
    assert answer.ok
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 3)
    assert len(answer.stamps_s) == 3
    assert all(gap >= PAUSE_S / 2 for gap in answer.gaps_s)
    assert answer.ttft_s >= PAUSE_S / 2  # the role alone is no token


def test_an_event_that_is_cut_anywhere_counts_once():
    whole = ROLE + event("a") + event("b") + USAGE + DONE
    for at in range(1, len(whole), 41):
        (answer,) = answers(Speaker([whole[:at], whole[at:]])).answers
        assert answer.ok
        assert len(answer.stamps_s) == 2


def test_events_that_arrive_together_have_no_gap():
    (answer,) = answers(Speaker([event("a") + event("b") + event("c"), USAGE])).answers
    assert answer.gaps_s == [0.0, 0.0]


def test_a_text_that_looks_like_usage_is_not_counted_as_such():
    (answer,) = answers(Speaker([event("a"), event('"usage":{"error":{'), USAGE + DONE])).answers
    assert (answer.ok, answer.completion_tokens, len(answer.stamps_s)) == (True, 3, 2)


def test_usage_beside_the_last_text_is_seen():
    usage = {"prompt_tokens": 5, "completion_tokens": 2}
    (answer,) = answers(Speaker([event("a"), event("b", usage=usage), DONE])).answers
    assert (answer.prompt_tokens, answer.completion_tokens, len(answer.stamps_s)) == (5, 2, 2)


def test_a_refusal_an_error_within_a_stream_and_a_broken_connection_are_failures():
    refused = Speaker([b'{"error": {"message": "no credit"}}'], status="402 Payment Required")
    broken = Speaker([event("a")], length=10)
    failed = Speaker([event("a"), b'data: {"error":{"message":"engine lost"}}\n\n', DONE])
    for speaker, said in ((refused, "no credit"), (broken, "closed"), (failed, "engine lost")):
        (answer,) = answers(speaker).answers
        assert not answer.ok
        assert said in answer.error


def test_a_server_that_is_not_there_is_a_failure_too():
    async def go() -> Run:
        async with Speaker([]) as url:
            pass
        return await closed(url, asked(url), 1)

    (answer,) = run(go).answers
    assert not answer.ok
    assert "rror" in answer.error


def test_streams_keep_their_connections():
    speaker = Speaker([event("a"), USAGE + DONE])
    taken = answers(speaker, count=12, streams=3)
    assert (speaker.requests, len(taken.answers)) == (12, 12)
    assert speaker.connections <= 3


def test_open_loop_does_not_wait_for_answers():
    async def go() -> Run:
        async with Speaker([event("a")] * 10 + [USAGE + DONE]) as url:
            return await opened(url, asked(url, 20), per_s=200, seed=1)

    taken = run(go)
    assert all(answer.ok for answer in taken.answers)
    assert taken.wall_s < 10 * 11 * PAUSE_S  # one after the other they would take 20 × 11 pauses


def test_blocks_go_to_each_server_in_turn_and_the_first_of_each_is_left_out():
    one, two = Speaker([event("a"), USAGE]), Speaker([event("b"), USAGE])

    async def go() -> list[list[Answer]]:
        async with one as first, two as second:
            urls = (first, second)
            return await alternating(urls, [asked(url, 6) for url in urls], block=3, quiet_s=0.01)

    told = run(go)
    assert [len(answers) for answers in told] == [4, 4]
    assert (one.requests, two.requests) == (6, 6)
    sent = sorted((answer.sent_s, server) for server, answers in enumerate(told) for answer in answers)
    assert [server for _, server in sent] == [0, 0, 1, 1, 0, 0, 1, 1]


def test_sigterm_ends_a_run_even_within_a_callback_and_the_handler_from_before_is_back():
    before = signal.getsignal(signal.SIGTERM)

    async def go() -> Run:
        asyncio.get_running_loop().call_later(PAUSE_S, os.kill, os.getpid(), signal.SIGTERM)
        async with Speaker([event("a")] * 1000) as url:
            return await closed(url, asked(url), 1)

    with pytest.raises(SystemExit):
        run(go)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_pool_connects_again_when_the_server_has_closed():
    speaker = Speaker([event("a"), USAGE], length=10)

    async def go() -> None:
        async with speaker as url:
            pool = Pool(url)
            for request in asked(url, 3):
                await pool.ask(request)

    run(go)
    assert speaker.connections == 3
