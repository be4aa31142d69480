"""Prompts are counted for free, and an answer's length is bounded by what there is room for."""

import dataclasses
from pathlib import Path

import pytest
from msgspec.structs import replace

from serve.engine.protocol import Finished
from serve.rate_limits.limits import Limits, LimitStore
from tests.support.agent_turns import claude_code_turn, codex_turn
from tests.support.constants import NOON
from tests.support.scripted_app import ACCEPTED, HELLO, Json, Script, ScriptedApp

COUNTED: Script = [[ACCEPTED, Finished(10, 0, 0, aborted=False)]]
ROUTES = [
    ("/v1/messages/count_tokens", claude_code_turn("tiny", "Hello"), {"input_tokens": 10}),
    (
        "/v1/responses/input_tokens",
        codex_turn("tiny", "Hello"),
        {"object": "response.input_tokens", "input_tokens": 10},
    ),
]


@pytest.mark.parametrize(("path", "body", "counted"), ROUTES, ids=["messages", "responses"])
def test_a_count_is_of_what_would_be_billed_and_costs_nothing(
    tmp_path: Path, path: str, body: Json, counted: Json
) -> None:
    played = ScriptedApp(tmp_path, COUNTED, HELLO)
    answer = played.ask("POST", path, body)
    assert (answer.status_code, answer.json()) == (200, counted)
    played.ask("POST", path.rpartition("/")[0], body)
    counting, generating = played.engine.requests
    assert (counting.count_only, generating.count_only) == (True, False)
    same = {"request_id": "", "collect": False, "context_tokens_max": None, "count_only": False}
    assert dataclasses.replace(counting, **same) == dataclasses.replace(generating, **same)  # type: ignore[arg-type]
    assert len(played.bills()) == 1


def test_a_count_needs_no_length_and_is_refused_as_a_message_is(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, COUNTED)
    body = claude_code_turn("tiny", "Hello")
    del body["max_tokens"]
    path = "/v1/messages/count_tokens"
    assert played.ask("POST", path, body).json() == {"input_tokens": 10}
    assert played.ask("POST", path, body | {"messages": []}).json()["type"] == "error"
    assert played.ask("POST", path, body | {"model": "other"}).status_code == 404
    assert played.ask("POST", path, body, authorization="Bearer no").status_code == 401
    assert played.ask("GET", path).status_code == 405


def test_a_count_is_one_of_the_requests_per_minute_and_no_tokens(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, COUNTED)
    with played.store.write() as connection:
        limits = Limits(requests_per_min=1, tokens_per_min=1)
        LimitStore(played.store).set(connection, "tenant", "acme", limits, at=NOON)
    path, body = "/v1/messages/count_tokens", claude_code_turn("tiny", "Hello")
    first = played.ask("POST", path, body)
    assert first.status_code == 200
    assert first.headers["x-ratelimit-remaining-requests"] == "0"
    assert played.ask("POST", path, body).status_code == 429


def granted(tokens: int) -> Script:
    return [[replace(ACCEPTED, completion_tokens_max=tokens)], *HELLO[1:]]


def test_an_answer_tells_a_length_below_the_one_asked_for(tmp_path: Path) -> None:
    hello = [{"role": "user", "content": "Hi"}]
    asked: list[tuple[str, Json, str]] = [
        ("/v1/chat/completions", {"messages": hello}, "max_tokens"),
        ("/v1/chat/completions", {"messages": hello}, "max_completion_tokens"),
        ("/v1/completions", {"prompt": "Hi"}, "max_tokens"),
        ("/v1/messages", {"messages": hello}, "max_tokens"),
        ("/v1/responses", {"input": "Hi"}, "max_output_tokens"),
    ]
    played = ScriptedApp(tmp_path, *[granted(700), granted(50)] * 10)
    for path, body, name in asked:
        for stream in (False, True):
            for most, told in ((4096, "700"), (50, None)):
                answer = played.ask("POST", path, {"model": "tiny", name: most, "stream": stream} | body)
                assert answer.status_code == 200, answer.text
                assert answer.headers.get("x-bespoke-max-tokens") == told
    lengths = [request.sampling.completion_tokens_max for request in played.engine.requests]
    assert lengths == [2048, 50] * 10


def test_a_request_counts_no_more_tokens_than_it_can_use(tmp_path: Path) -> None:
    """The scripted engine's context is 1,000 tokens: no length above it can make a request dearer."""
    played = ScriptedApp(tmp_path, HELLO)
    hello = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny"}
    with played.store.write() as connection:
        LimitStore(played.store).set(connection, "tenant", "acme", Limits(tokens_per_min=1), at=NOON)
    told = set()
    for asked in (1000, 2048, 4096, 2**60):
        answer = played.ask("POST", "/v1/chat/completions", hello | {"max_tokens": asked})
        assert answer.status_code == 429
        told.add(answer.json()["error"]["message"])
    assert len(told) == 1
