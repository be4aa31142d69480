"""A response is stored before the client has its answer, belongs to one tenant, and is bounded."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.billing.ledger.holds import HoldRequest, Outcome, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.client_data.stored_responses import (
    RETENTION,
    StoredResponse,
    StoredResponses,
    responses_table,
    shelves_table,
)
from serve.engine.protocol import Delta, Message, ToolCall
from serve.errors import ResponseNotFound, StoreUnavailable
from serve.formats.responses.objects import DeletedResponse, InputItemList, ResponseObject
from serve.storage.database import Store
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.scripted_app import BROKEN, HELLO, LEFT, Json, ScriptedApp, says

pytestmark = pytest.mark.usefixtures("app_on_both")

PATH = "/v1/responses"
ASK: Json = {"model": "tiny", "input": "Hello"}


def stored(name: str, size: int = 0) -> StoredResponse:
    return StoredResponse({"id": f"resp_{name}", "output": []}, [{"text": "x" * size}])


def shelf(store: Store, tenant: str = "acme") -> tuple[int, int]:
    """The tenant's counted responses and bytes, which must equal the stored ones."""
    c, s = responses_table.c, shelves_table.c
    items = sa.select(sa.func.count(), sa.func.coalesce(sa.func.sum(c.bytes), 0)).where(c.tenant_id == tenant)
    with store.read() as connection:
        actual = tuple(connection.execute(items).one())
        counted = connection.execute(sa.select(s.responses, s.bytes).where(s.tenant_id == tenant)).one()
    assert actual == tuple(counted)
    return actual


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_is_read_again_as_it_was_answered(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    body = played.stream(PATH, ASK)[-1]["response"] if stream else played.say(PATH, ASK)
    assert body["store"]
    read = played.ask("GET", f"{PATH}/{body['id']}").json()
    ResponseObject.model_validate(read)
    assert read == body


def test_a_streamed_response_is_stored_before_its_last_event_is_sent(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    store, seen = StoredResponses.store, []

    def watched(self: StoredResponses, *args: Any, **kwargs: Any) -> None:
        seen.append(bytes(came))
        store(self, *args, **kwargs)

    came = bytearray()

    async def receive() -> Json:
        if sent:
            return sent.pop()
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        came.extend(message.get("body", b""))

    sent = [
        {"type": "http.request", "body": b'{"model":"tiny","input":"x","stream":true}', "more_body": False}
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredResponses, "store", watched)
        played.run(played.app(played.scope(PATH), receive, send))
    assert len(seen) == 1
    assert b'"delta":"lo"' in seen[0]
    assert b"response.completed" not in seen[0]
    assert b"response.completed" in came


def test_the_conversation_goes_on_without_the_instructions(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first = played.say(PATH, ASK | {"instructions": "Be brief."})
    second = played.stream(
        PATH,
        {"model": "tiny", "input": "And?", "previous_response_id": first["id"], "instructions": "Be kind."},
    )[-1]["response"]
    played.say(PATH, {"model": "tiny", "input": "So?", "previous_response_id": second["id"]})
    turns = (
        Message("user", "Hello"),
        Message("assistant", "Hello"),
        Message("user", "And?"),
        Message("assistant", "Hello"),
        Message("user", "So?"),
    )
    prompts = [request.prompt for request in played.engine.requests]
    assert prompts == [
        (Message("system", "Be brief."), *turns[:1]),
        (Message("system", "Be kind."), *turns[:3]),
        turns,
    ]
    assert second["previous_response_id"] == first["id"]


def test_the_conversation_goes_on_when_its_beginning_is_deleted(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first = played.say(PATH, ASK)
    second = played.say(PATH, ASK | {"previous_response_id": first["id"]})
    deleted = played.ask("DELETE", f"{PATH}/{first['id']}").json()
    DeletedResponse.model_validate(deleted)
    played.say(PATH, ASK | {"previous_response_id": second["id"]})
    assert len(played.engine.requests[-1].prompt) == 5  # type: ignore[arg-type]
    answer = played.ask("POST", PATH, ASK | {"previous_response_id": first["id"]})
    assert (answer.status_code, answer.json()["error"]) == (
        400,
        {
            "message": f"Previous response with id '{first['id']}' not found.",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        },
    )


def test_a_conversation_has_a_bound(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    many = [{"role": "user", "content": "x"}] * 255
    first = played.say(PATH, {"model": "tiny", "input": many})
    answer = played.ask("POST", PATH, ASK | {"previous_response_id": first["id"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input")


def test_input_items_come_in_pages(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first = played.say(PATH, {"model": "tiny", "input": [{"role": "user", "content": t} for t in "abc"]})
    second = played.say(PATH, {"model": "tiny", "input": "d", "previous_response_id": first["id"]})
    path = f"{PATH}/{second['id']}/input_items"

    def texts(query: str) -> tuple[str, bool, str]:
        page = played.ask("GET", path + query).json()
        InputItemList.model_validate(page)
        assert [page["data"][0]["id"], page["data"][-1]["id"]] == [page["first_id"], page["last_id"]]
        items = [item["content"][0]["text"] for item in page["data"]]
        return ",".join(items), page["has_more"], page["last_id"]

    assert texts("?order=asc")[:2] == ("a,b,c,Hello,d", False)
    items, more, last = texts("?limit=2")
    assert (items, more) == ("d,Hello", True)
    items, more, last = texts(f"?limit=2&after={last}")
    assert (items, more) == ("c,b", True)
    assert texts(f"?limit=2&after={last}")[:2] == ("a", False)
    assert played.ask("GET", f"{path}?after={last}").json()["data"][0]["content"][0]["text"] == "a"
    end = played.ask("GET", f"{path}?order=asc&after={second['output'][0]['id']}")
    assert end.status_code == 400
    assert played.ask("GET", f"{path}?limit=101").json()["error"]["param"] == "limit"
    ids = [item["id"] for item in played.ask("GET", path).json()["data"]]
    assert len({*ids, second["output"][0]["id"]}) == 6


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_to_be_stored_is_not(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    request = ASK | {"store": False}
    body = played.stream(PATH, request)[-1]["response"] if stream else played.say(PATH, request)
    assert not body["store"]
    assert played.ask("GET", f"{PATH}/{body['id']}").status_code == 404


@pytest.mark.parametrize("script", [BROKEN, LEFT], ids=["broken", "left"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_short_is_billed_and_not_stored(
    tmp_path: Path, script: Any, stream: bool
) -> None:
    played = ScriptedApp(tmp_path, script)
    if script is LEFT:
        played.leave(PATH, ASK | {"stream": stream})
    else:
        played.ask("POST", PATH, ASK | {"stream": stream})
    assert len(played.bills()) == 1
    with played.store.read() as connection:
        assert not connection.execute(sa.select(responses_table)).all()


def test_anothers_response_looks_like_one_that_does_not_exist(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    mine = played.say(PATH, ASK)["id"]
    for method, tail in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        theirs, unknown = (
            played.ask(method, f"{PATH}/{name}{tail}", tenant="rival") for name in (mine, "resp_none")
        )
        assert theirs.status_code == unknown.status_code == 404
        assert theirs.text.replace(mine, "resp_none") == unknown.text
        assert theirs.json()["error"] == {
            "message": f"Response with id '{mine}' not found.",
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
    theirs = played.ask("POST", PATH, ASK | {"previous_response_id": mine}, tenant="rival")
    assert theirs.json()["error"]["code"] == "previous_response_not_found"
    assert played.ask("GET", f"{PATH}/{mine}").status_code == 200


def test_a_response_is_neither_cancelled_nor_streamed_later(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    mine = played.say(PATH, ASK)["id"]
    assert played.ask("POST", f"{PATH}/{mine}/cancel").status_code == 400
    assert played.ask("GET", f"{PATH}/{mine}?stream=true").json()["error"]["param"] == "stream"


def test_a_key_is_needed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    mine = played.say(PATH, ASK)["id"]
    for method in ("GET", "DELETE"):
        assert played.ask(method, f"{PATH}/{mine}", authorization="Bearer no").status_code == 401


def test_a_stream_whose_response_cannot_be_stored_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreUnavailable()

    played = ScriptedApp(tmp_path, HELLO)
    monkeypatch.setattr(StoredResponses, "store", away)
    last = played.stream(PATH, ASK)[-1]
    assert (last["type"], last["response"]["store"]) == ("response.completed", False)
    assert played.bills() == [("acme", "complete", 10, 4, 2)]


def test_an_answer_that_cannot_be_stored_is_billed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    played = ScriptedApp(tmp_path, HELLO)
    monkeypatch.setattr(StoredResponses, "insert", broken)
    body = played.say(PATH, ASK)
    assert (body["status"], body["store"]) == ("completed", False)
    assert played.bills() == [("acme", "complete", 10, 4, 2)]


def test_an_answer_is_stored_in_the_transaction_that_bills_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, refused = Ledger.apply, []

    def flaky(self: Ledger, entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        (entry,) = entries
        if refused or not isinstance(entry, Resolution):
            return apply(self, entries)
        refused.append(True)

        def away(connection: sa.Connection) -> None:
            assert entry.in_transaction is not None
            entry.in_transaction(connection)
            raise sa.exc.OperationalError("commit", None, Exception())

        return apply(self, [replace(entry, in_transaction=away)])

    played = ScriptedApp(tmp_path, HELLO)
    monkeypatch.setattr(Ledger, "apply", flaky)
    body = played.say(PATH, ASK)
    assert refused
    assert played.ask("GET", f"{PATH}/{body['id']}").json() == body
    assert len(played.bills()) == 1
    assert shelf(played.store)[0] == 1


def test_the_oldest_make_room_by_number(shop: BillingFixture) -> None:
    responses = StoredResponses(shop.store, responses_max=3)
    for number in range(5):
        at = NOON + timedelta(seconds=number)
        responses.store("acme", f"req_{number}", stored(str(number)), at=at)
        assert shelf(shop.store)[0] == min(number + 1, 3)
    for number in range(2):
        with pytest.raises(ResponseNotFound):
            responses.find("acme", f"resp_{number}", at=NOON)
    assert responses.find("acme", "resp_2", at=NOON) == stored("2")


def test_the_oldest_make_room_by_bytes_and_the_newest_always_stays(shop: BillingFixture) -> None:
    responses = StoredResponses(shop.store, bytes_max=1000)
    for number, size in enumerate([100, 100, 100, 700, 5000]):
        at = NOON + timedelta(seconds=number)
        responses.store("acme", f"req_{number}", stored(str(number), size), at=at)
        responses.find("acme", f"resp_{number}", at=at)
        if number == 3:
            assert shelf(shop.store)[0] == 2
    assert shelf(shop.store)[0] == 1


def test_a_tenants_shelf_is_its_own(shop: BillingFixture) -> None:
    shop.tenants.create("rival", at=NOON)
    responses = StoredResponses(shop.store, responses_max=1)
    responses.store("acme", "req_1", stored("1"), at=NOON)
    responses.store("rival", "req_2", stored("2"), at=NOON)
    assert shelf(shop.store)[0] == shelf(shop.store, "rival")[0] == 1
    with pytest.raises(ResponseNotFound):
        responses.delete("rival", "resp_1", at=NOON)
    responses.delete("acme", "resp_1", at=NOON)
    assert shelf(shop.store) == (0, 0)


def test_what_has_expired_is_not_there_and_then_is_swept(
    shop: BillingFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.client_data.stored_responses._STEP", 2)
    responses = StoredResponses(shop.store)
    for number in range(5):
        responses.store("acme", f"req_{number}", stored(str(number)), at=NOON)
    later = NOON + timedelta(hours=1)
    responses.store("acme", "req_later", stored("later"), at=later)
    assert responses.sweep(at=NOON + RETENTION - timedelta(seconds=1)) == 0
    with pytest.raises(ResponseNotFound):
        responses.find("acme", "resp_0", at=NOON + RETENTION)
    with pytest.raises(ResponseNotFound):
        responses.delete("acme", "resp_0", at=NOON + RETENTION)
    assert responses.sweep(at=NOON + RETENTION) == 5
    assert shelf(shop.store)[0] == 1
    responses.find("acme", "resp_later", at=NOON + RETENTION)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_was_cut_is_stored_as_it_was_answered_and_the_conversation_goes_on(
    tmp_path: Path, stream: bool
) -> None:
    call = Delta(0, "Well.", 1, tool_calls=(ToolCall(0, "call_1", "weather", '{"ci'),))
    rest = Delta(0, "", 1, "length", tool_calls=(ToolCall(0, arguments='ty": "Os'),))
    played = ScriptedApp(tmp_path, says(call, rest), HELLO)
    body = ASK | {"tools": [{"type": "function", "name": "weather"}]}
    answer = played.stream(PATH, body)[-1]["response"] if stream else played.say(PATH, body)
    assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    message, item = answer["output"]
    assert (message["content"][0]["text"], item["status"]) == ("Well.", "incomplete")
    assert (item["name"], item["arguments"]) == ("weather", '{"city": "Os')
    assert played.ask("GET", f"{PATH}/{answer['id']}").json()["output"] == answer["output"]
    result = {"type": "function_call_output", "call_id": "call_1", "output": "cut"}
    played.say(PATH, {"model": "tiny", "input": [result], "previous_response_id": answer["id"]})
    turn = played.engine.requests[-1].prompt[1]
    assert turn == Message("assistant", "Well.", (ToolCall(0, "call_1", "weather", '{"city": "Os'),))
