"""An Idempotency-Key's answer is repeated and billed once, whatever fails in between."""

from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.billing.ledger.ledger import Ledger
from serve.client_data.idempotency import IdempotencyCommitHook, idempotency_table, retry_after_s
from serve.engine.protocol import Delta, TokenLogprob
from serve.errors import EngineUnavailable
from tests.support.scripted_app import ACCEPTED, BROKEN, FINISHED, HELLO, LEFT, ScriptedApp

pytestmark = pytest.mark.usefixtures("app_on_both")

CHAT = "/v1/chat/completions"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
KEY = {"Idempotency-Key": "one"}


def events(played: ScriptedApp) -> int:
    from serve.billing.metering.events import usage_table

    with played.store.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(usage_table)).scalar_one()


def keys(played: ScriptedApp) -> int:
    with played.store.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(idempotency_table)).scalar_one()


def test_the_second_request_gets_the_firsts_answer_to_the_byte(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first, second = (played.ask("POST", CHAT, BODY, **KEY) for _ in range(2))
    assert first.status_code == second.status_code == 200
    assert second.content == first.content
    assert second.headers["x-original-request-id"] == first.headers["x-request-id"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert (events(played), len(played.engine.requests)) == (1, 1)


def test_the_log_probabilities_of_a_kept_answer_are_counted_from_its_beginning(tmp_path: Path) -> None:
    """The answer is rendered twice, to be stored and to be sent: both must be the same."""
    logprobs = (TokenLogprob(b"Hel", -0.5), TokenLogprob(b"lo", -0.25))
    played = ScriptedApp(tmp_path, [[ACCEPTED], [Delta(0, "Hello", 2, "stop", logprobs=logprobs), FINISHED]])
    text = {"model": "tiny", "prompt": "Say", "logprobs": 1}
    first, second = (played.ask("POST", "/v1/completions", text, **KEY) for _ in range(2))
    assert second.headers["idempotency-replayed"] == "true"
    assert second.content == first.content
    assert first.json()["choices"][0]["logprobs"]["text_offset"] == [0, 3]


def test_a_key_belongs_to_a_tenant_a_route_and_a_body(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.ask("POST", CHAT, BODY, **KEY)
    assert played.ask("POST", CHAT, BODY, tenant="rival", **KEY).status_code == 200
    other = played.ask("POST", CHAT, BODY | {"max_tokens": 6}, **KEY)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    text = {"model": "tiny", "prompt": "Hello"}
    assert played.ask("POST", "/v1/completions", text, **KEY).status_code == 400
    assert events(played) == 2


@pytest.mark.parametrize("script", [BROKEN, [EngineUnavailable()]], ids=["in mid-answer", "at once"])
def test_a_request_that_failed_leaves_its_key_free(tmp_path: Path, script: object) -> None:
    played = ScriptedApp(tmp_path, script, HELLO)  # type: ignore[arg-type]
    assert played.ask("POST", CHAT, BODY, **KEY).status_code in (500, 503)
    assert keys(played) == 0
    assert played.ask("POST", CHAT, BODY, **KEY).status_code == 200


def test_while_the_first_request_runs_another_gets_409(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.ask("POST", CHAT, BODY, **KEY)
    with played.store.write() as connection:
        connection.execute(idempotency_table.update().values(body=None))
    refused = played.ask("POST", CHAT, BODY, **KEY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    assert refused.headers["retry-after"] == "1"


def test_a_409_says_to_wait_as_long_as_the_first_request_has_run(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.ask("POST", CHAT, BODY, **KEY)
    lease = played.app.state.context.idempotency.lease
    claimed_at = played.gateway.context.now() - timedelta(seconds=20)
    with played.store.write() as connection:
        connection.execute(idempotency_table.update().values(body=None, expires_at=claimed_at + lease))
    refused = played.ask("POST", CHAT, BODY, **KEY)
    assert 20 <= int(refused.headers["retry-after"]) <= 50
    assert f"try again in {refused.headers['retry-after']}s" in refused.json()["error"]["message"]
    assert "x-should-retry" not in refused.headers


@pytest.mark.parametrize(
    ("elapsed_s", "left_s", "wait_s"), [(0, 700, 1), (2.5, 700, 3), (300, 400, 60), (690, 10, 10), (-1, 9, 1)]
)
def test_the_wait_has_a_least_and_a_most(elapsed_s: float, left_s: float, wait_s: int) -> None:
    assert retry_after_s(timedelta(seconds=elapsed_s), timedelta(seconds=left_s)) == wait_s


def test_a_key_whose_gateway_died_is_free_once_its_lease_is_over(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.ask("POST", CHAT, BODY, **KEY)
    past = played.gateway.context.now() - timedelta(seconds=1)
    with played.store.write() as connection:
        connection.execute(idempotency_table.update().values(body=None, expires_at=past))
    assert played.ask("POST", CHAT, BODY, **KEY).status_code == 200
    assert events(played) == 2


def test_a_key_that_is_too_long_is_refused(tmp_path: Path) -> None:
    answer = ScriptedApp(tmp_path, HELLO).ask("POST", CHAT, BODY, **{"Idempotency-Key": "x" * 256})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "Idempotency-Key")


def test_without_a_key_a_client_that_leaves_stops_the_engine(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, LEFT)
    played.leave(CHAT, BODY)
    assert played.engine.aborted.is_set()
    assert events(played) == 1


def test_a_bug_in_keeping_leaves_the_request_billed_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(IdempotencyCommitHook, "on_settle", broken)
    played = ScriptedApp(tmp_path, HELLO)
    assert played.ask("POST", CHAT, BODY, **KEY).status_code == 200
    assert (events(played), keys(played)) == (1, 0)
    assert not Ledger(played.store).open_holds()


def test_what_has_expired_is_swept(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.ask("POST", CHAT, BODY, **KEY)
    idempotency = played.app.state.context.idempotency
    now = played.gateway.context.now()
    assert idempotency.sweep(at=now) == 0
    assert idempotency.sweep(at=now + timedelta(hours=25)) == 1
    assert keys(played) == 0
