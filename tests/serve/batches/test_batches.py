"""Invariant 3 for batches: each line is billed once and its answer stored, whenever a process dies."""

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.batches import runner
from serve.batches.batches import Batch, BatchStatus
from serve.batches.output import write_output
from serve.billing.ledger import writer
from serve.errors import (
    Conflict,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
)
from tests.support.batching import CHAT, COST_NANOS, LEASE, BatchFixture, jsonl, line
from tests.support.databases import NewDatabase

NAMES = [f"line {number}" for number in range(5)]
FILE = jsonl(*(line(name) for name in NAMES))


@pytest.fixture
def batching(new_database: NewDatabase, tmp_path: Path) -> Iterator[BatchFixture]:
    with new_database() as url:
        batching = BatchFixture(tmp_path, url)
        with closing(batching.store):
            yield batching


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "BACKOFF_S_MIN", 0.001)
    monkeypatch.setattr(writer, "BATCH_MAX", 1)  # so that the number of writes is always the same
    monkeypatch.setattr(runner, "BACKOFF_S_MAX", 0.01)


def now(batching: BatchFixture, batch: Batch) -> Batch:
    return batching.batches.get(batch.tenant, batch.id)


def check_complete(batching: BatchFixture, batch: Batch, names: list[str]) -> None:
    """Every line has its own answer, in order, and is billed once; nothing is held."""
    batch = now(batching, batch)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.lines, batch.completed, batch.failed) == (len(names), len(names), 0)
    output, bills = batching.output(batch), batching.bills()
    assert [entry["custom_id"] for entry in output] == names
    for entry in output:
        body = entry["response"]["body"]
        assert entry["response"]["status_code"] == 200
        assert body["choices"][0]["message"]["content"] == entry["custom_id"]
        assert body["usage"]["total_tokens"] == 12
    assert sorted(bill.request_id for bill in bills) == sorted(
        entry["response"]["request_id"] for entry in output
    )
    assert {bill.tier for bill in bills} == {"batch"}
    assert not batching.ledger.open_holds()
    account = batching.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (len(names) * COST_NANOS, 0)


def test_a_batch_is_validated_run_and_written(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    assert batch.status is BatchStatus.VALIDATING
    batching.work()
    check_complete(batching, batch, NAMES)
    assert batching.errors(batch) == []
    assert set(batching.engine.attempts.values()) == {1}
    assert batching.engine.running_max <= 2


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("death_at", range(1, 21))
def test_a_worker_may_die_at_any_write(batching: BatchFixture, death_at: int, after: bool) -> None:
    batch = batching.submit(FILE)
    batching.work_and_die(death_at, after=after)
    batching.at += LEASE
    batching.work()
    check_complete(batching, batch, NAMES)


# The fixture keeps nothing: it makes a database for each example.
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    count=st.integers(1, 6),
    in_flight=st.integers(1, 4),
    deaths=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=4),
)
def test_no_line_is_lost_or_billed_twice_however_often_workers_die(
    new_database: NewDatabase, count: int, in_flight: int, deaths: list[tuple[int, bool]]
) -> None:
    names = [f"line {number}" for number in range(count)]
    with tempfile.TemporaryDirectory() as home, new_database() as url:
        batching = BatchFixture(Path(home), url)
        batch = batching.submit(jsonl(*(line(name) for name in names)))
        for death_at, after in deaths:
            batching.work_and_die(death_at, after=after, requests_in_flight=in_flight)
            batching.at += LEASE
        batching.work()
        check_complete(batching, batch, names)
        batching.store.close()


def test_a_worker_that_was_only_slow_can_neither_bill_nor_keep_a_line_that_another_has_taken(
    batching: BatchFixture,
) -> None:
    batch = batching.submit(jsonl(line("slow")))

    async def scenario() -> None:
        batching.engine.gate = asyncio.Event()
        slow = asyncio.create_task(batching.worker().run_one())
        while not batching.engine.running:
            await asyncio.sleep(0.01)
        batching.at += LEASE
        gate, batching.engine.gate = batching.engine.gate, None
        assert await batching.worker().run_one()  # takes it over, and to its end
        gate.set()
        assert await slow

    asyncio.run(scenario())
    assert batching.engine.attempts["slow"] == 2
    check_complete(batching, batch, ["slow"])


def test_a_worker_that_stops_finishes_what_runs_and_gives_the_batch_back(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)

    async def scenario() -> None:
        batching.engine.gate = asyncio.Event()
        worker = batching.worker()
        worker.start()
        while batching.engine.running < 2:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        batching.engine.gate.set()
        await asyncio.wait_for(stopping, 10)

    asyncio.run(scenario())
    assert (now(batching, batch).status, now(batching, batch).completed) == (
        BatchStatus.IN_PROGRESS,
        2,
    )
    assert not batching.ledger.open_holds()
    batching.engine.gate = None
    batching.work()  # at the same time: no lease is in the way
    check_complete(batching, batch, NAMES)


@pytest.mark.parametrize(
    "fault",
    [
        Overloaded(),
        EngineUnavailable(),
        RateLimited("new schemas being compiled", 8, 8, 1, 3),
    ],
)
def test_what_may_pass_is_waited_for(batching: BatchFixture, fault: BaseException) -> None:
    batching.engine.faults = {"line 1": [fault, fault]}
    batch = batching.submit(FILE)
    batching.work()
    check_complete(batching, batch, NAMES)


@pytest.mark.parametrize("limits", [{"concurrent_requests": 1}, {"requests_per_min": 3}])
def test_the_tenants_limits_hold_and_its_batch_waits_for_them(
    batching: BatchFixture, limits: dict[str, int]
) -> None:
    batching.tenants.change("acme", at=batching.at, limits=limits)
    batch = batching.submit(FILE if "concurrent_requests" in limits else jsonl(line("a"), line("b")))
    batching.work()
    assert now(batching, batch).failed == 0
    assert now(batching, batch).status is BatchStatus.COMPLETED
    assert batching.engine.running_max == 1 or "requests_per_min" in limits


def test_a_line_that_no_waiting_would_let_through_is_an_error(batching: BatchFixture) -> None:
    batching.tenants.change("acme", at=batching.at, limits={"tokens_per_min": 1})
    batch = batching.submit(jsonl(line("a")))
    batching.work()
    assert [entry["response"]["status_code"] for entry in batching.errors(batch)] == [429]


def test_a_line_whose_replica_dies_is_sent_again(batching: BatchFixture) -> None:
    batching.engine.faults = {"line 1": [EngineLost()]}
    batch = batching.submit(FILE)
    batching.work()
    check_complete(batching, batch, NAMES)


def test_a_line_with_which_two_replicas_die_is_given_up(batching: BatchFixture) -> None:
    batching.engine.faults = {"line 1": [EngineLost(), EngineLost()]}  # a third attempt would succeed
    batch = batching.submit(FILE)
    batching.work()
    (entry,) = batching.errors(batch)
    assert entry["response"]["status_code"] == 500
    assert (now(batching, batch).completed, now(batching, batch).failed) == (4, 1)


@pytest.mark.parametrize(
    ("changes", "status_code", "code"),
    [
        ({"model": "acme/nothing"}, 404, "model_not_found"),
        ({"model": "rival/support"}, 404, "model_not_found"),
    ],
)
def test_a_line_that_fails_is_in_the_error_file_and_costs_nothing(
    batching: BatchFixture, changes: dict[str, Any], status_code: int, code: str
) -> None:
    batch = batching.submit(jsonl(line("good"), line("bad", **changes)))
    batching.work()
    assert now(batching, batch).status is BatchStatus.COMPLETED
    (entry,) = batching.errors(batch)
    assert (entry["custom_id"], entry["error"]) == ("bad", None)
    assert entry["response"]["status_code"] == status_code
    assert entry["response"]["body"]["error"]["code"] == code
    assert [one["custom_id"] for one in batching.output(batch)] == ["good"]
    assert len(batching.bills()) == 1


def test_a_line_whose_schema_is_too_complex_is_an_error_and_the_others_are_answered(
    batching: BatchFixture,
) -> None:
    batching.engine.faults = {"line 2": [InvalidRequest("too much", "response_format", "schema_too_complex")]}
    batch = batching.submit(FILE)
    batching.work()
    (entry,) = batching.errors(batch)
    assert (entry["custom_id"], entry["response"]["status_code"]) == ("line 2", 400)
    assert entry["response"]["body"]["error"]["code"] == "schema_too_complex"
    assert len(batching.bills()) == 4
    assert not batching.ledger.open_holds()


def test_an_engine_that_breaks_on_a_line_makes_it_an_error(batching: BatchFixture) -> None:
    batching.engine.faults = {"line 2": [EngineFailed()]}
    batch = batching.submit(FILE)
    batching.work()
    assert [entry["custom_id"] for entry in batching.errors(batch)] == ["line 2"]
    assert len(batching.bills()) == 4
    assert not batching.ledger.open_holds()


def test_an_answer_that_is_cut_short_is_an_error_billed_once_and_not_tried_again(
    batching: BatchFixture,
) -> None:
    batching.engine.breaks_at = "line 2"
    batch = batching.submit(FILE)
    batching.work()
    (entry,) = batching.errors(batch)
    assert entry["response"]["status_code"] == 500
    assert entry["response"]["body"]["error"]["code"] == "engine_failed"
    assert batching.engine.attempts["line 2"] == 1
    assert [bill.status for bill in batching.bills()].count("failed") == 1
    assert entry["response"]["request_id"] in {bill.request_id for bill in batching.bills()}
    assert not batching.ledger.open_holds()


def test_what_the_credit_does_not_cover_is_an_error(batching: BatchFixture) -> None:
    batching.ledger.open_account("acme", 0)
    batch = batching.submit(FILE)
    batching.work()
    assert {entry["response"]["body"]["error"]["code"] for entry in batching.errors(batch)} == {
        "insufficient_quota"
    }
    assert (now(batching, batch).failed, now(batching, batch).output_file_id) == (5, None)


def test_a_revoked_key_runs_nothing_more(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    batching.tenants.revoke_key(batching.key_of("acme"), at=batching.at)
    batching.work()
    assert [entry["response"]["status_code"] for entry in batching.errors(batch)] == [401] * 5
    assert not batching.engine.attempts
    assert not batching.bills()


def test_a_cancelled_batch_keeps_what_is_done_and_runs_nothing_more(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)

    async def scenario() -> None:
        batching.engine.gate = asyncio.Event()
        working = asyncio.create_task(batching.worker().run_one())
        while batching.engine.running < 2:
            await asyncio.sleep(0.01)
        assert batching.batches.cancel("acme", batch.id, at=batching.at).status is BatchStatus.CANCELLING
        batching.engine.gate.set()
        await working

    asyncio.run(scenario())
    assert now(batching, batch).status is BatchStatus.CANCELLED
    assert [entry["custom_id"] for entry in batching.output(batch)] == NAMES[:2]
    errors = batching.errors(batch)
    assert [entry["custom_id"] for entry in errors] == NAMES[2:]
    assert {entry["error"]["code"] for entry in errors} == {"batch_cancelled"}
    assert len(batching.bills()) == 2
    assert batching.batches.cancel("acme", batch.id, at=batching.at).status is BatchStatus.CANCELLED


def test_a_batch_whose_time_is_over_expires_with_what_is_done(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    assert batching.work_and_die(9, after=True)
    billed = len(batching.bills())
    batching.at += timedelta(hours=24)
    batching.work()
    assert now(batching, batch).status is BatchStatus.EXPIRED
    assert now(batching, batch).times["expired"] == batching.at
    assert len(batching.output(batch)) == len(batching.bills()) == billed > 0
    assert {entry["error"]["code"] for entry in batching.errors(batch)} == {"batch_expired"}
    assert len(batching.output(batch)) + len(batching.errors(batch)) == 5
    assert not batching.ledger.open_holds()


def test_nothing_of_a_file_with_an_error_runs(batching: BatchFixture) -> None:
    batch = batching.submit(jsonl(line("a"), line("b", n=99)) + b"x\n")
    batching.work()
    batch = now(batching, batch)
    assert batch.status is BatchStatus.FAILED
    assert [(error.line, error.param) for error in batch.errors] == [(2, "body.n"), (3, None)]
    assert not batching.engine.attempts


def test_a_batch_of_another_tenant_is_not_there(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    for ask in (batching.batches.get, lambda *a: batching.batches.cancel(*a, at=batching.at)):
        with pytest.raises(NotFound) as theirs:
            ask("rival", batch.id)
        with pytest.raises(NotFound) as nobodys:
            ask("rival", batch.id[::-1])
        assert theirs.value.message.replace(batch.id, "") == nobodys.value.message.replace(batch.id[::-1], "")
    assert not batching.batches.page("rival", limit=10).items
    with pytest.raises(NotFound):
        batching.batches.create(
            "rival",
            "key",
            endpoint=CHAT,
            input_file_id=batch.input_file_id,
            metadata=None,
            at=batching.at,
        )


def test_unfinished_batches_are_bounded_and_short_ones_do_not_wait_for_another_tenants(
    batching: BatchFixture,
) -> None:
    for _ in range(3):
        batching.submit(FILE)
    with pytest.raises(Conflict, match="3 unfinished"):
        batching.submit(FILE)
    batching.at += timedelta(seconds=1)
    rivals = batching.submit(FILE, tenant="rival")
    work = batching.worker()._queue
    first, second = work.take(at=batching.at), work.take(at=batching.at)
    assert first is not None
    assert (first.tenant, second and second.id) == ("acme", rivals.id)


def test_an_input_file_must_be_for_batches_and_outlive_the_batch(batching: BatchFixture) -> None:
    def create(file_id: str) -> None:
        batching.batches.create(
            "acme",
            batching.key_of("acme"),
            endpoint=CHAT,
            input_file_id=file_id,
            metadata=None,
            at=batching.at,
        )

    with pytest.raises(InvalidRequest, match="purpose"):
        create(batching.upload(FILE, purpose="fine-tune"))
    draft = batching.files.draft("acme")
    soon = batching.at + timedelta(hours=1)
    file = batching.files.add(draft, "acme", purpose="batch", filename="f", at=batching.at, expires_at=soon)
    with pytest.raises(InvalidRequest, match="expires"):
        create(file.id)


def test_a_worker_without_the_lease_ends_nothing_and_leaves_no_files(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    assert batching.work_and_die(17, after=False)  # all is done, and the files are not known yet
    late, work = batching.worker()._queue, batching.worker()._queue
    batching.at += LEASE
    assert late.take(at=batching.at)
    batching.at += LEASE
    assert work.take(at=batching.at)
    before = sorted(batching.home.glob("files/*/*"))
    assert late.renew(batch.id, at=batching.at) is None
    assert not late.begin(batch.id, lines=1, at=batching.at)
    assert not late.finalize(batch.id, at=batching.at)
    write_output(
        now(batching, batch),
        BatchStatus.COMPLETED,
        lines=batching.lines,
        files=batching.files,
        queue=late,
        at=batching.at,
    )
    assert sorted(batching.home.glob("files/*/*")) == before
    late.release(batch.id)
    assert work.renew(batch.id, at=batching.at) is not None


def test_a_file_that_a_batch_reads_cannot_be_deleted_until_it_is_over(batching: BatchFixture) -> None:
    batch = batching.submit(FILE)
    readers = batching.batches.readers(batch.input_file_id)
    with pytest.raises(Conflict):
        batching.files.delete("acme", batch.input_file_id, at=batching.at, in_use=readers)
    batching.work()
    batching.files.delete("acme", batch.input_file_id, at=batching.at, in_use=readers)
    check_complete(batching, batch, NAMES)


def test_the_answers_are_in_the_tenants_file_alone_once_the_batch_is_over(
    batching: BatchFixture,
) -> None:
    batch = batching.submit(FILE)
    batching.work()
    with batching.store.read() as connection:
        query = "SELECT count(*) FROM batch_results WHERE body IS NOT NULL"
        assert connection.exec_driver_sql(query).scalar() == 0
    assert now(batching, batch).completed == 5
