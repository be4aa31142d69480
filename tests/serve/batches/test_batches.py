"""Invariant 3 for batches: each line is billed once and its answer kept, whatever dies whenever."""

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
)
from tests.support.batching import CHAT, COST_NANOS, LEASE, Floor, jsonl, line
from tests.support.databases import NewDatabase

NAMES = [f"line {number}" for number in range(5)]
FILE = jsonl(*(line(name) for name in NAMES))


@pytest.fixture
def floor(new_database: NewDatabase, tmp_path: Path) -> Iterator[Floor]:
    with new_database() as url:
        floor = Floor(tmp_path, url)
        with closing(floor.store):
            yield floor


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "PAUSE_S_MIN", 0.001)
    monkeypatch.setattr(writer, "BATCH_MAX", 1)  # so that the number of writes is always the same
    monkeypatch.setattr(runner, "PAUSE_S_MAX", 0.01)


def now(floor: Floor, batch: Batch) -> Batch:
    return floor.batches.get(batch.tenant, batch.id)


def check_complete(floor: Floor, batch: Batch, names: list[str]) -> None:
    """Every line has its own answer, in order, and is billed once; nothing is held."""
    batch = now(floor, batch)
    assert batch.status is BatchStatus.COMPLETED
    assert (batch.lines, batch.completed, batch.failed) == (len(names), len(names), 0)
    output, bills = floor.output(batch), floor.bills()
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
    assert not floor.ledger.open_holds()
    account = floor.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (len(names) * COST_NANOS, 0)


def test_a_batch_is_validated_run_and_written(floor: Floor) -> None:
    batch = floor.submit(FILE)
    assert batch.status is BatchStatus.VALIDATING
    floor.work()
    check_complete(floor, batch, NAMES)
    assert floor.errors(batch) == []
    assert set(floor.engine.asked.values()) == {1}
    assert floor.engine.running_max <= 2


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("death_at", range(1, 21))
def test_a_worker_may_die_at_any_write(floor: Floor, death_at: int, after: bool) -> None:
    batch = floor.submit(FILE)
    floor.work_and_die(death_at, after=after)
    floor.at += LEASE
    floor.work()
    check_complete(floor, batch, NAMES)


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
        floor = Floor(Path(home), url)
        batch = floor.submit(jsonl(*(line(name) for name in names)))
        for death_at, after in deaths:
            floor.work_and_die(death_at, after=after, requests_in_flight=in_flight)
            floor.at += LEASE
        floor.work()
        check_complete(floor, batch, names)
        floor.store.close()


def test_a_worker_that_was_only_slow_can_neither_bill_nor_keep_a_line_that_another_has_taken(
    floor: Floor,
) -> None:
    batch = floor.submit(jsonl(line("slow")))

    async def scenario() -> None:
        floor.engine.gate = asyncio.Event()
        slow = asyncio.create_task(floor.worker().work())
        while not floor.engine.running:
            await asyncio.sleep(0.01)
        floor.at += LEASE
        gate, floor.engine.gate = floor.engine.gate, None
        assert await floor.worker().work()  # takes it over, and to its end
        gate.set()
        assert await slow

    asyncio.run(scenario())
    assert floor.engine.asked["slow"] == 2
    check_complete(floor, batch, ["slow"])


def test_a_worker_that_stops_finishes_what_runs_and_gives_the_batch_back(floor: Floor) -> None:
    batch = floor.submit(FILE)

    async def scenario() -> None:
        floor.engine.gate = asyncio.Event()
        worker = floor.worker()
        worker.start()
        while floor.engine.running < 2:
            await asyncio.sleep(0.01)
        stopping = asyncio.create_task(worker.stop())
        await asyncio.sleep(0.05)
        floor.engine.gate.set()
        await asyncio.wait_for(stopping, 10)

    asyncio.run(scenario())
    assert (now(floor, batch).status, now(floor, batch).completed) == (BatchStatus.IN_PROGRESS, 2)
    assert not floor.ledger.open_holds()
    floor.engine.gate = None
    floor.work()  # at the same time: no lease is in the way
    check_complete(floor, batch, NAMES)


@pytest.mark.parametrize("fault", [Overloaded(), EngineUnavailable(), EngineLost()])
def test_what_may_pass_is_waited_for(floor: Floor, fault: BaseException) -> None:
    floor.engine.faults = {"line 1": [fault, fault]}
    batch = floor.submit(FILE)
    floor.work()
    check_complete(floor, batch, NAMES)


@pytest.mark.parametrize("limits", [{"concurrent_requests": 1}, {"requests_per_min": 3}])
def test_the_tenants_limits_hold_and_its_batch_waits_for_them(floor: Floor, limits: dict[str, int]) -> None:
    floor.tenants.change("acme", at=floor.at, limits=limits)
    batch = floor.submit(FILE if "concurrent_requests" in limits else jsonl(line("a"), line("b")))
    floor.work()
    assert now(floor, batch).failed == 0
    assert now(floor, batch).status is BatchStatus.COMPLETED
    assert floor.engine.running_max == 1 or "requests_per_min" in limits


def test_a_line_that_no_waiting_would_let_through_is_an_error(floor: Floor) -> None:
    floor.tenants.change("acme", at=floor.at, limits={"tokens_per_min": 1})
    batch = floor.submit(jsonl(line("a")))
    floor.work()
    assert [entry["response"]["status_code"] for entry in floor.errors(batch)] == [429]


def test_a_line_that_kills_replica_after_replica_is_given_up(floor: Floor) -> None:
    floor.engine.faults = {"line 1": [EngineLost() for _ in range(20)]}
    batch = floor.submit(FILE)
    floor.work()
    (entry,) = floor.errors(batch)
    assert entry["response"]["status_code"] == 500
    assert (now(floor, batch).completed, now(floor, batch).failed) == (4, 1)


@pytest.mark.parametrize(
    ("changes", "status_code", "code"),
    [
        ({"model": "acme/nothing"}, 404, "model_not_found"),
        ({"model": "rival/support"}, 404, "model_not_found"),
    ],
)
def test_a_line_that_fails_is_in_the_error_file_and_costs_nothing(
    floor: Floor, changes: dict[str, Any], status_code: int, code: str
) -> None:
    batch = floor.submit(jsonl(line("good"), line("bad", **changes)))
    floor.work()
    assert now(floor, batch).status is BatchStatus.COMPLETED
    (entry,) = floor.errors(batch)
    assert (entry["custom_id"], entry["error"]) == ("bad", None)
    assert entry["response"]["status_code"] == status_code
    assert entry["response"]["body"]["error"]["code"] == code
    assert [one["custom_id"] for one in floor.output(batch)] == ["good"]
    assert len(floor.bills()) == 1


def test_an_engine_that_breaks_on_a_line_makes_it_an_error(floor: Floor) -> None:
    floor.engine.faults = {"line 2": [EngineFailed()]}
    batch = floor.submit(FILE)
    floor.work()
    assert [entry["custom_id"] for entry in floor.errors(batch)] == ["line 2"]
    assert len(floor.bills()) == 4
    assert not floor.ledger.open_holds()


def test_an_answer_that_is_cut_short_is_an_error_billed_once_and_not_tried_again(floor: Floor) -> None:
    floor.engine.breaks_at = "line 2"
    batch = floor.submit(FILE)
    floor.work()
    (entry,) = floor.errors(batch)
    assert entry["response"]["status_code"] == 500
    assert entry["response"]["body"]["error"]["code"] == "engine_failed"
    assert floor.engine.asked["line 2"] == 1
    assert [bill.status for bill in floor.bills()].count("failed") == 1
    assert entry["response"]["request_id"] in {bill.request_id for bill in floor.bills()}
    assert not floor.ledger.open_holds()


def test_what_the_credit_does_not_cover_is_an_error(floor: Floor) -> None:
    floor.ledger.open_account("acme", 0)
    batch = floor.submit(FILE)
    floor.work()
    assert {entry["response"]["body"]["error"]["code"] for entry in floor.errors(batch)} == {
        "insufficient_quota"
    }
    assert (now(floor, batch).failed, now(floor, batch).output_file_id) == (5, None)


def test_a_revoked_key_runs_nothing_more(floor: Floor) -> None:
    batch = floor.submit(FILE)
    floor.tenants.revoke_key(floor.key_of("acme"), at=floor.at)
    floor.work()
    assert [entry["response"]["status_code"] for entry in floor.errors(batch)] == [401] * 5
    assert not floor.engine.asked
    assert not floor.bills()


def test_a_cancelled_batch_keeps_what_is_done_and_runs_nothing_more(floor: Floor) -> None:
    batch = floor.submit(FILE)

    async def scenario() -> None:
        floor.engine.gate = asyncio.Event()
        working = asyncio.create_task(floor.worker().work())
        while floor.engine.running < 2:
            await asyncio.sleep(0.01)
        assert floor.batches.cancel("acme", batch.id, at=floor.at).status is BatchStatus.CANCELLING
        floor.engine.gate.set()
        await working

    asyncio.run(scenario())
    assert now(floor, batch).status is BatchStatus.CANCELLED
    assert [entry["custom_id"] for entry in floor.output(batch)] == NAMES[:2]
    errors = floor.errors(batch)
    assert [entry["custom_id"] for entry in errors] == NAMES[2:]
    assert {entry["error"]["code"] for entry in errors} == {"batch_cancelled"}
    assert len(floor.bills()) == 2
    assert floor.batches.cancel("acme", batch.id, at=floor.at).status is BatchStatus.CANCELLED


def test_a_batch_whose_time_is_over_expires_with_what_is_done(floor: Floor) -> None:
    batch = floor.submit(FILE)
    assert floor.work_and_die(9, after=True)
    billed = len(floor.bills())
    floor.at += timedelta(hours=24)
    floor.work()
    assert now(floor, batch).status is BatchStatus.EXPIRED
    assert now(floor, batch).times["expired"] == floor.at
    assert len(floor.output(batch)) == len(floor.bills()) == billed > 0
    assert {entry["error"]["code"] for entry in floor.errors(batch)} == {"batch_expired"}
    assert len(floor.output(batch)) + len(floor.errors(batch)) == 5
    assert not floor.ledger.open_holds()


def test_nothing_of_a_file_with_an_error_runs(floor: Floor) -> None:
    batch = floor.submit(jsonl(line("a"), line("b", n=99)) + b"x\n")
    floor.work()
    batch = now(floor, batch)
    assert batch.status is BatchStatus.FAILED
    assert [(error.line, error.param) for error in batch.errors] == [(2, "body.n"), (3, None)]
    assert not floor.engine.asked


def test_a_batch_of_another_tenant_is_not_there(floor: Floor) -> None:
    batch = floor.submit(FILE)
    for ask in (floor.batches.get, lambda *a: floor.batches.cancel(*a, at=floor.at)):
        with pytest.raises(NotFound) as theirs:
            ask("rival", batch.id)
        with pytest.raises(NotFound) as nobodys:
            ask("rival", batch.id[::-1])
        assert theirs.value.message.replace(batch.id, "") == nobodys.value.message.replace(batch.id[::-1], "")
    assert not floor.batches.page("rival", limit=10).items
    with pytest.raises(NotFound):
        floor.batches.create(
            "rival", "key", endpoint=CHAT, input_file_id=batch.input_file_id, metadata=None, at=floor.at
        )


def test_unfinished_batches_are_bounded_and_short_ones_do_not_wait_for_another_tenants(floor: Floor) -> None:
    for _ in range(3):
        floor.submit(FILE)
    with pytest.raises(Conflict, match="3 unfinished"):
        floor.submit(FILE)
    floor.at += timedelta(seconds=1)
    rivals = floor.submit(FILE, tenant="rival")
    work = floor.worker()._work
    first, second = work.take(at=floor.at), work.take(at=floor.at)
    assert first is not None
    assert (first.tenant, second and second.id) == ("acme", rivals.id)


def test_an_input_file_must_be_for_batches_and_outlive_the_batch(floor: Floor) -> None:
    def create(file_id: str) -> None:
        floor.batches.create(
            "acme", floor.key_of("acme"), endpoint=CHAT, input_file_id=file_id, metadata=None, at=floor.at
        )

    with pytest.raises(InvalidRequest, match="purpose"):
        create(floor.upload(FILE, purpose="fine-tune"))
    draft = floor.files.draft("acme")
    soon = floor.at + timedelta(hours=1)
    file = floor.files.add(draft, "acme", purpose="batch", filename="f", at=floor.at, expires_at=soon)
    with pytest.raises(InvalidRequest, match="expires"):
        create(file.id)


def test_a_worker_without_the_lease_ends_nothing_and_leaves_no_files(floor: Floor) -> None:
    batch = floor.submit(FILE)
    assert floor.work_and_die(17, after=False)  # all is done, and the files are not known yet
    late, work = floor.worker()._work, floor.worker()._work
    floor.at += LEASE
    assert late.take(at=floor.at)
    floor.at += LEASE
    assert work.take(at=floor.at)
    before = sorted(floor.home.glob("files/*/*"))
    assert late.renew(batch.id, at=floor.at) is None
    assert not late.begin(batch.id, lines=1, at=floor.at)
    assert not late.finalize(batch.id, at=floor.at)
    write_output(
        now(floor, batch), BatchStatus.COMPLETED, lines=floor.lines, files=floor.files, work=late, at=floor.at
    )
    assert sorted(floor.home.glob("files/*/*")) == before
    late.give_back(batch.id)
    assert work.renew(batch.id, at=floor.at) is not None


def test_a_file_that_a_batch_reads_cannot_be_deleted_until_it_is_over(floor: Floor) -> None:
    batch = floor.submit(FILE)
    readers = floor.batches.readers(batch.input_file_id)
    with pytest.raises(Conflict):
        floor.files.delete("acme", batch.input_file_id, at=floor.at, in_use=readers)
    floor.work()
    floor.files.delete("acme", batch.input_file_id, at=floor.at, in_use=readers)
    check_complete(floor, batch, NAMES)


def test_the_answers_are_in_the_tenants_file_alone_once_the_batch_is_over(floor: Floor) -> None:
    batch = floor.submit(FILE)
    floor.work()
    with floor.store.read() as connection:
        query = "SELECT count(*) FROM batch_results WHERE body IS NOT NULL"
        assert connection.exec_driver_sql(query).scalar() == 0
    assert now(floor, batch).completed == 5
