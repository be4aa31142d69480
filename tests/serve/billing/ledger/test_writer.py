"""Tests group commit: entries that wait together commit together, each with its own outcome."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta

import pytest

from serve.billing.ledger.holds import Hold, HoldRequest, Outcome, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.errors import InsufficientCredit, StoreUnavailable
from tests.serve.billing.ledger.test_ledger import event
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.waiting import wait_until

LEASE = timedelta(minutes=10)


class GatedLedger(Ledger):
    """Waits at `gate` before each transaction, and records the transactions' sizes."""

    def __init__(self, shop: BillingFixture) -> None:
        super().__init__(shop.store)
        self.gate = threading.Event()
        self.sizes: list[int] = []

    def apply(self, entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        self.sizes.append(len(entries))
        assert self.gate.wait(30)
        return super().apply(entries)


@pytest.fixture
def ledger(shop: BillingFixture) -> GatedLedger:
    return GatedLedger(shop)


@pytest.fixture
def commit_queue(ledger: GatedLedger) -> Iterator[CommitQueue]:
    commit_queue = CommitQueue(ledger)
    yield commit_queue
    ledger.gate.set()
    commit_queue.stop()


def hold_request(request_id: str, amount_nanos: int = 1000) -> HoldRequest:
    return HoldRequest(Hold(request_id, "acme", amount_nanos), NOON, LEASE)


def settlement(shop: BillingFixture, request_id: str) -> Resolution:
    return Resolution(request_id, "acme", NOON, event=event(shop, request_id))


def test_what_waits_while_the_store_writes_is_the_next_transaction(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    first = commit_queue.submit(hold_request("r0"))
    wait_until(lambda: ledger.sizes == [1])
    others = [commit_queue.submit(hold_request(f"r{number}")) for number in range(1, 20)]
    ledger.gate.set()
    assert [future.result(30) for future in (first, *others)] == [True] * 20
    assert ledger.sizes == [1, 19]
    assert shop.ledger.account("acme").held_nanos == 20_000


def test_a_hold_and_its_settlement_in_one_transaction_are_both_done(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    waiting = commit_queue.submit(hold_request("r0"))
    wait_until(lambda: ledger.sizes == [1])
    both = [commit_queue.submit(hold_request("r1")), commit_queue.submit(settlement(shop, "r1"))]
    ledger.gate.set()
    assert [future.result(30) for future in (waiting, *both)] == [True] * 3
    assert ledger.sizes == [1, 2]
    assert shop.ledger.account("acme").spent_nanos == 700


def test_one_that_is_refused_refuses_nobody_else(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    async def scenario() -> list[object]:
        tasks = [
            asyncio.create_task(commit_queue.hold(hold_request(f"r{number}", amount)))
            for number, amount in enumerate([1000, 10**12, 1000])
        ]
        await asyncio.sleep(0)
        ledger.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = asyncio.run(scenario())
    assert [type(outcome) for outcome in outcomes] == [type(None), InsufficientCredit, type(None)]


def test_one_that_breaks_the_transaction_breaks_it_for_itself_only(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    def broken(_connection: object) -> None:
        raise ZeroDivisionError

    ledger.gate.set()
    holds = [commit_queue.submit(hold_request(f"r{number}")) for number in range(3)]
    assert all(future.result(30) for future in holds)
    ledger.gate.clear()
    waiting = commit_queue.submit(hold_request("r9"))
    wait_until(lambda: ledger.sizes[-1] == 1)
    bad = Resolution("r1", "acme", NOON, reason="test", in_transaction=broken)
    resolutions = [
        commit_queue.submit(resolution)
        for resolution in (settlement(shop, "r0"), bad, settlement(shop, "r2"))
    ]
    ledger.gate.set()
    assert waiting.result(30)
    outcomes = [future.result(30) for future in resolutions]
    assert outcomes[0] is outcomes[2] is True
    assert isinstance(outcomes[1], ZeroDivisionError)
    assert [one.hold.request_id for one in shop.ledger.open_holds()] == ["r1", "r9"]


def test_a_store_that_is_away_is_told_to_everybody_who_waits(
    shop: BillingFixture, commit_queue: CommitQueue, ledger: GatedLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_entries: object) -> list[Outcome]:
        raise StoreUnavailable()

    monkeypatch.setattr(ledger, "apply", away)
    with pytest.raises(StoreUnavailable):
        asyncio.run(commit_queue.hold(hold_request("r0")))
    monkeypatch.undo()
    ledger.gate.set()
    asyncio.run(commit_queue.hold(hold_request("r0")))


def test_after_it_is_stopped_what_waited_is_done_and_nothing_more_is_taken(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    waiting = [commit_queue.submit(hold_request(f"r{number}")) for number in range(5)]
    ledger.gate.set()
    commit_queue.stop()
    assert all(future.done() for future in waiting)
    with pytest.raises(StoreUnavailable):
        commit_queue.submit(hold_request("r9"))
    assert len(shop.ledger.open_holds()) == 5


def test_the_settlement_of_one_that_stopped_waiting_is_done_all_the_same(
    shop: BillingFixture, ledger: GatedLedger, commit_queue: CommitQueue
) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(commit_queue.hold(hold_request("r0")))
        while not ledger.sizes:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        ledger.gate.set()
        await commit_queue.hold(hold_request("r1"))

    asyncio.run(scenario())
    assert [one.hold.request_id for one in shop.ledger.open_holds()] == ["r0", "r1"]
