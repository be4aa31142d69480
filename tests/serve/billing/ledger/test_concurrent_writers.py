"""Tests the ledger under many writers: three stores with threads at the limit of budgets and credit."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from typing import TypeVar

import pytest
import sqlalchemy as sa

from serve.billing.budgets.budgets import spend_table
from serve.billing.budgets.service import BudgetService
from serve.billing.ledger.holds import Hold, HoldRequest, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.rollups import hours_table
from serve.errors import BudgetExceeded, StoreUnavailable
from serve.storage.database import Store
from tests.serve.billing.budgets.test_budgets import Spender
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

LEASE = timedelta(minutes=10)
T = TypeVar("T")


@pytest.fixture
def spender(shop: BillingFixture) -> Spender:
    return Spender(shop)


@pytest.fixture
def stores(shop: BillingFixture) -> Iterator[list[Store]]:
    """Opens the shop's store three times, as three gateways do."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Store(shop.store.url))) for _ in range(3)]


def a_hold(spender: Spender, number: int, amount_nanos: int) -> Hold:
    terms = json.dumps({"project": spender.project, "key_id": spender.key})
    return Hold(f"many-{number}", "acme", amount_nanos, spender.project, spender.key, terms)


def patiently(act: Callable[[], T]) -> T:
    """Retry until the store is available: on a slow machine a write may time out behind others."""
    while True:
        with suppress(StoreUnavailable):
            return act()


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
def test_200_parallel_holds_at_the_edge_of_a_hard_budget_never_overshoot_it(
    spender: Spender, stores: list[Store], level: str
) -> None:
    budgets = {
        scope: spender.budget(scope, 1000 if scope == level else 10**9)
        for scope in ("tenant", "project", "key")
    }
    ledgers = [Ledger(store) for store in stores]

    def attempt(number: int) -> Hold | str:
        hold = a_hold(spender, number, 30)
        try:
            patiently(lambda: ledgers[number % 3].hold(hold, at=NOON, lease=LEASE))
        except BudgetExceeded as refused:
            return refused.scope
        return hold

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(attempt, range(200)))
    admitted = [outcome for outcome in outcomes if isinstance(outcome, Hold)]
    assert len(admitted) == 33
    assert {outcome for outcome in outcomes if isinstance(outcome, str)} == {level}
    assert {spender.usage_of(budget) for budget in budgets.values()} == {(0, 990)}

    def close(hold: Hold) -> int:
        """Resolve the hold twice, from another store than the one that took it."""
        number = int(hold.request_id.removeprefix("many-"))
        ledger = ledgers[(number + 1) % 3]
        if number % 2:
            return sum(patiently(lambda: ledger.void(hold, "test", at=NOON)) for _ in range(2))
        return sum(patiently(lambda: ledger.settle(hold, spender.event(hold, 20), at=NOON)) for _ in range(2))

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(close, admitted)) == {1}
    spent = 20 * sum(int(hold.request_id.removeprefix("many-")) % 2 == 0 for hold in admitted)
    assert {spender.usage_of(budget) for budget in budgets.values()} == {(spent, 0)}
    account = spender.shop.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (spent, 0)


def test_group_commit_of_three_gateways_keeps_the_budget_too(spender: Spender, stores: list[Store]) -> None:
    budget = spender.budget("project", 1000)
    commit_queues = [CommitQueue(Ledger(store)) for store in stores]
    hold_futures = [
        commit_queues[number % 3].submit(HoldRequest(a_hold(spender, number, 30), NOON, LEASE))
        for number in range(200)
    ]
    outcomes = [future.result(60) for future in hold_futures]
    assert sum(outcome is True for outcome in outcomes) == 33
    assert {type(outcome) for outcome in outcomes} == {bool, BudgetExceeded}
    assert spender.usage_of(budget) == (0, 990)
    resolution_futures = []
    for number, outcome in enumerate(outcomes):
        if outcome is True:
            event = spender.event(a_hold(spender, number, 30), 30)
            resolution = Resolution(event.request_id, "acme", NOON, event=event)
            resolution_futures += [
                commit_queue.submit(resolution) for commit_queue in commit_queues
            ]  # each is delivered three times
    assert sum(future.result(60) is True for future in resolution_futures) == 33
    for commit_queue in commit_queues:
        commit_queue.stop()
    assert spender.usage_of(budget) == (990, 0)


def test_a_budget_that_is_made_while_requests_come_and_go_misses_none_and_counts_none_twice(
    spender: Spender, stores: list[Store]
) -> None:
    done = threading.Event()

    def trade(worker: int) -> None:
        ledger = Ledger(stores[worker % 3])
        for number in range(40):
            hold = a_hold(spender, worker * 1000 + number, 50)
            ledger.hold(hold, at=NOON, lease=LEASE)
            ledger.settle(hold, spender.event(hold, 7), at=NOON)

    def manage() -> list[str]:
        budget_ids = []
        for level in ("tenant", "project", "key"):
            for period in ("day", "month", "total"):
                budget_ids.append(spender.budget(level, 10**9, period))
                done.wait(0.02)
        return budget_ids

    with ThreadPoolExecutor(7) as pool:
        budgets = pool.submit(manage)
        for trading in [pool.submit(trade, worker) for worker in range(6)]:
            trading.result()
        budget_ids = budgets.result()
    with spender.shop.store.read() as connection:
        total = connection.execute(sa.select(sa.func.sum(hours_table.c.cost_nanos))).scalar_one()
    assert total == 6 * 40 * 7
    assert {spender.usage_of(budget) for budget in budget_ids} == {(total, 0)}


def test_limits_changed_and_budgets_retired_under_way_leak_nothing(
    spender: Spender, stores: list[Store]
) -> None:
    first = spender.budget("tenant", 2000)

    def trade(worker: int) -> int:
        ledger, spent = Ledger(stores[worker % 3]), 0
        for number in range(30):
            hold = a_hold(spender, worker * 1000 + number, 60)
            try:
                ledger.hold(hold, at=NOON, lease=LEASE)
            except BudgetExceeded:
                continue
            if number % 3:
                ledger.settle(hold, spender.event(hold, 11), at=NOON)
                spent += 11
            else:
                ledger.void(hold, "test", at=NOON)
        return spent

    def manage() -> None:
        budgets = BudgetService(stores[0])
        for number in range(10):
            budgets.change(
                "acme", first, {"limit_nanos": 500 * (number % 4), "hard": number % 3 > 0}, at=NOON
            )
            budget_id = spender.budget("key", 100 * number)
            budgets.retire("acme", budget_id, at=NOON)

    with ThreadPoolExecutor(7) as pool:
        managing = pool.submit(manage)
        spent = sum(pool.map(trade, range(6)))
        managing.result()
    assert spender.usage_of(first) == (spent, 0)
    with spender.shop.store.read() as connection:
        assert connection.execute(sa.select(sa.func.max(spend_table.c.held_nanos))).scalar_one() == 0
    assert spender.shop.ledger.account("acme").held_nanos == 0
