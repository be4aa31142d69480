"""The load tests' client against a server that answers to the byte."""

import json

import pytest

from loadtests.load.client import Call, Client
from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.target import Offer
from serve.billing.pricing.plans import Tokens
from tests.support.scripted_server import Recorded, Server, plain, streamed

OFFER = Offer("acme", "bsk-secret", "acme/support")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def event(said: object) -> bytes:
    return b"data: " + json.dumps(said).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
LAST = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
STREAM = (ROLE, piece("a"), piece("b"), piece("c"), LAST, DONE)
LIMITED = json.dumps({"error": {"code": "rate_limit_exceeded"}}).encode()


def ask(*answers: bytes, call: Call | None = None, expected: frozenset[str] = frozenset()) -> Exchange:
    recorded = Recorded()
    with Server(*answers) as server:
        client = Client(server.url, recorded, expected=expected)
        exchange = client.ask("row", OFFER, call or Call("Hello", 8))
        client.close()
    assert recorded.exchanges == [exchange]  # exactly once, however it ended
    return exchange


def test_a_whole_stream_gives_the_services_counts_and_its_request_id() -> None:
    exchange = ask(streamed(*STREAM, number=5))
    assert (exchange.outcome, exchange.request_id) == (Outcome.COMPLETE, "req_5")
    assert (exchange.tokens, exchange.pieces) == (Tokens(7, 2, 3), 3)


def test_the_time_to_the_first_piece_and_between_pieces_is_kept() -> None:
    recorded = Recorded()
    with Server(streamed(*STREAM)) as server:
        Client(server.url, recorded).ask("row", OFFER, Call("Hello", 8))
    (exchange, gaps), *_ = recorded.entries
    assert exchange.ttft_ms is not None
    assert 0 < exchange.ttft_ms < exchange.latency_ms
    assert len(gaps.between_ms) == 2  # three pieces: the role and the usage are none


def test_an_event_that_comes_in_parts_is_read_whole() -> None:
    sent = b"".join(STREAM)
    exchange = ask(streamed(*(sent[at : at + 7] for at in range(0, len(sent), 7))))
    assert (exchange.outcome, exchange.pieces) == (Outcome.COMPLETE, 3)


def test_a_text_completion_has_pieces_too() -> None:
    text = event({"choices": [{"index": 0, "text": "a"}]})
    exchange = ask(streamed(text, LAST, DONE), call=Call("Hello", 8, chat=False))
    assert (exchange.outcome, exchange.pieces) == (Outcome.COMPLETE, 1)


def test_a_whole_answer_is_read_at_once() -> None:
    exchange = ask(plain(json.dumps({"usage": USAGE}).encode()), call=Call("Hello", 8, stream=False))
    assert (exchange.outcome, exchange.tokens, exchange.ttft_ms) == (Outcome.COMPLETE, Tokens(7, 2, 3), None)


def test_the_request_is_openais_and_bears_the_key() -> None:
    with Server(streamed(*STREAM)) as server:
        Client(server.url, Recorded()).ask("row", OFFER, Call("Hello", 8))
    said = json.loads(server.asked[0])
    assert (said["model"], said["max_tokens"]) == ("acme/support", 8)
    assert said["stream_options"] == {"include_usage": True}


def test_one_connection_serves_one_request_after_the_other() -> None:
    recorded = Recorded()
    with Server(streamed(*STREAM), streamed(*STREAM), streamed(*STREAM)) as server:
        client = Client(server.url, recorded)
        for _ in range(3):
            client.ask("row", OFFER, Call("Hello", 8))
    assert [e.outcome for e in recorded.exchanges] == [Outcome.COMPLETE] * 3
    assert server.connections == 1


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_client_that_leaves_has_seen_that_many_pieces(pieces: int) -> None:
    exchange = ask(streamed(*STREAM), call=Call("Hello", 8, leave_after=pieces))
    assert (exchange.outcome, exchange.pieces) == (Outcome.LEFT, pieces)
    assert (exchange.tokens, exchange.request_id) == (None, "req_1")


def test_a_stream_that_ends_before_its_time_has_failed() -> None:
    cut = ask(streamed(*STREAM[:3]))
    assert (cut.outcome, cut.code, cut.pieces) == (Outcome.FAILED, "stream_cut", 2)


def test_a_connection_that_breaks_in_a_stream_has_failed() -> None:
    broken = ask(streamed(*STREAM[:3], complete=False))
    assert (broken.outcome, broken.pieces, broken.request_id) == (Outcome.FAILED, 2, "req_1")
    assert broken.code is not None


def test_a_connection_that_breaks_before_the_answer_has_no_request_id() -> None:
    broken = ask(b"")
    assert (broken.outcome, broken.request_id, broken.status) == (Outcome.FAILED, None, 0)


def test_a_stream_without_its_counts_has_failed() -> None:
    assert ask(streamed(ROLE, piece("a"), DONE)).code == "no_usage"


def test_an_error_in_a_stream_has_openais_code() -> None:
    failed = ask(streamed(ROLE, piece("a"), event({"error": {"code": "engine_failed"}})))
    assert (failed.outcome, failed.code, failed.pieces) == (Outcome.FAILED, "engine_failed", 1)


def test_what_is_no_json_has_failed() -> None:
    assert ask(plain(b"oops"), call=Call("Hello", 8, stream=False)).code == "malformed_answer"


def test_a_refusal_that_is_expected_is_no_failure() -> None:
    answer = plain(LIMITED, b"429 Too Many Requests")
    refused = ask(answer, expected=frozenset({"rate_limit_exceeded"}))
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "rate_limit_exceeded")
    assert ask(answer).outcome is Outcome.FAILED


def test_an_error_that_is_not_openais_is_named_by_its_status() -> None:
    assert ask(plain(b"<html>", b"502 Bad Gateway")).code == "http_502"
