"""The load tests' client reads what a scripted server answers byte for byte."""

import json

import pytest

from loadtests.load.client import Client, RequestSpec
from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.load.service_under_test import ModelAccess
from serve.billing.pricing.plans import Tokens
from tests.support.scripted_server import RecordList, ScriptedServer, plain, streamed

MODEL = ModelAccess("acme", "bsk-secret", "acme/support")
USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def piece(text: str) -> bytes:
    return event({"choices": [{"index": 0, "delta": {"content": text}}], "usage": None})


ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
LAST = event({"choices": [], "usage": USAGE})
DONE = b"data: [DONE]\n\n"
STREAM = (ROLE, piece("a"), piece("b"), piece("c"), LAST, DONE)
LIMITED = json.dumps({"error": {"code": "rate_limit_exceeded"}}).encode()


def send(
    *answers: bytes, spec: RequestSpec | None = None, expected_codes: frozenset[str] = frozenset()
) -> RequestRecord:
    record_list = RecordList()
    with ScriptedServer(*answers) as server:
        client = Client(server.url, record_list, expected_codes=expected_codes)
        record = client.send("row", MODEL, spec or RequestSpec("Hello", 8))
        client.close()
    assert record_list.records == [record]  # exactly once, however it ended
    return record


def test_a_whole_stream_gives_the_services_counts_and_its_request_id() -> None:
    record = send(streamed(*STREAM, number=5))
    assert (record.outcome, record.request_id) == (Outcome.COMPLETE, "req_5")
    assert (record.tokens, record.pieces) == (Tokens(7, 2, 3), 3)


def test_the_time_to_the_first_piece_and_between_pieces_is_kept() -> None:
    record_list = RecordList()
    with ScriptedServer(streamed(*STREAM)) as server:
        Client(server.url, record_list).send("row", MODEL, RequestSpec("Hello", 8))
    (record, timing), *_ = record_list.entries
    assert record.ttft_ms is not None
    assert 0 < record.ttft_ms < record.latency_ms
    assert len(timing.between_ms) == 2  # three pieces: the role and the usage are none


def test_an_event_that_comes_in_parts_is_read_whole() -> None:
    sent = b"".join(STREAM)
    record = send(streamed(*(sent[at : at + 7] for at in range(0, len(sent), 7))))
    assert (record.outcome, record.pieces) == (Outcome.COMPLETE, 3)


def test_a_text_completion_has_pieces_too() -> None:
    text = event({"choices": [{"index": 0, "text": "a"}]})
    record = send(streamed(text, LAST, DONE), spec=RequestSpec("Hello", 8, chat=False))
    assert (record.outcome, record.pieces) == (Outcome.COMPLETE, 1)


def test_a_whole_answer_is_read_at_once() -> None:
    record = send(plain(json.dumps({"usage": USAGE}).encode()), spec=RequestSpec("Hello", 8, stream=False))
    assert (record.outcome, record.tokens, record.ttft_ms) == (Outcome.COMPLETE, Tokens(7, 2, 3), None)


def test_the_request_is_openais_and_bears_the_key() -> None:
    with ScriptedServer(streamed(*STREAM)) as server:
        Client(server.url, RecordList()).send("row", MODEL, RequestSpec("Hello", 8))
    body = json.loads(server.request_bodies[0])
    assert (body["model"], body["max_tokens"]) == ("acme/support", 8)
    assert body["stream_options"] == {"include_usage": True}


def test_one_connection_serves_one_request_after_the_other() -> None:
    record_list = RecordList()
    with ScriptedServer(streamed(*STREAM), streamed(*STREAM), streamed(*STREAM)) as server:
        client = Client(server.url, record_list)
        for _ in range(3):
            client.send("row", MODEL, RequestSpec("Hello", 8))
    assert [e.outcome for e in record_list.records] == [Outcome.COMPLETE] * 3
    assert server.connections == 1


@pytest.mark.parametrize("pieces", [0, 1, 2])
def test_a_client_that_leaves_has_seen_that_many_pieces(pieces: int) -> None:
    record = send(streamed(*STREAM), spec=RequestSpec("Hello", 8, leave_after=pieces))
    assert (record.outcome, record.pieces) == (Outcome.LEFT, pieces)
    assert (record.tokens, record.request_id) == (None, "req_1")


def test_a_stream_that_ends_before_its_time_has_failed() -> None:
    cut = send(streamed(*STREAM[:3]))
    assert (cut.outcome, cut.code, cut.pieces) == (Outcome.FAILED, "stream_cut", 2)


def test_a_connection_that_breaks_in_a_stream_has_failed() -> None:
    broken = send(streamed(*STREAM[:3], whole=False))
    assert (broken.outcome, broken.pieces, broken.request_id) == (Outcome.FAILED, 2, "req_1")
    assert broken.code is not None


def test_a_connection_that_breaks_before_the_answer_has_no_request_id() -> None:
    broken = send(b"")
    assert (broken.outcome, broken.request_id, broken.status) == (Outcome.FAILED, None, 0)


def test_a_stream_without_its_counts_has_failed() -> None:
    assert send(streamed(ROLE, piece("a"), DONE)).code == "no_usage"


def test_an_error_in_a_stream_has_openais_code() -> None:
    failed = send(streamed(ROLE, piece("a"), event({"error": {"code": "engine_failed"}})))
    assert (failed.outcome, failed.code, failed.pieces) == (Outcome.FAILED, "engine_failed", 1)


def test_what_is_no_json_has_failed() -> None:
    assert send(plain(b"oops"), spec=RequestSpec("Hello", 8, stream=False)).code == "malformed_answer"


def test_a_refusal_that_is_expected_is_no_failure() -> None:
    answer = plain(LIMITED, b"429 Too Many Requests")
    refused = send(answer, expected_codes=frozenset({"rate_limit_exceeded"}))
    assert (refused.outcome, refused.code) == (Outcome.REFUSED, "rate_limit_exceeded")
    assert send(answer).outcome is Outcome.FAILED


def test_an_error_that_is_not_openais_is_named_by_its_status() -> None:
    assert send(plain(b"<html>", b"502 Bad Gateway")).code == "http_502"
