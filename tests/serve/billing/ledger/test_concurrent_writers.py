"""The ledger under many writers: three stores and their threads at the edge of budgets and of credit."""

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
from serve.billing.ledger.ledger import Hold, HoldRequest, Ledger, Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.rollups import hours_table
from serve.errors import BudgetExceeded, StoreUnavailable
from serve.storage.database import Store
from tests.serve.billing.budgets.test_budgets import Till
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

LEASE = timedelta(minutes=10)
T = TypeVar("T")


@pytest.fixture
def till(shop: BillingFixture) -> Till:
    return Till(shop)


@pytest.fixture
def stores(shop: BillingFixture) -> Iterator[list[Store]]:
    """Three gateways' handles on the shop's store."""
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Store(shop.store.url))) for _ in range(3)]


def a_hold(till: Till, number: int, amount_nanos: int) -> Hold:
    terms = json.dumps({"project": till.project, "key_id": till.key})
    return Hold(f"many-{number}", "acme", amount_nanos, till.project, till.key, terms)


def patiently(act: Callable[[], T]) -> T:
    """On a slow machine the others' writes may keep one waiting for longer than the store does."""
    while True:
        with suppress(StoreUnavailable):
            return act()


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
def test_200_parallel_holds_at_the_edge_of_a_hard_budget_never_overshoot_it(
    till: Till, stores: list[Store], level: str
) -> None:
    made = {one: till.budget(one, 1000 if one == level else 10**9) for one in ("tenant", "project", "key")}
    ledgers = [Ledger(store) for store in stores]

    def attempt(number: int) -> Hold | str:
        hold = a_hold(till, number, 30)
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
    assert {till.standing(budget) for budget in made.values()} == {(0, 990)}

    def close(hold: Hold) -> int:
        """Twice each, from another store than took it."""
        number = int(hold.request_id.removeprefix("many-"))
        ledger = ledgers[(number + 1) % 3]
        if number % 2:
            return sum(patiently(lambda: ledger.void(hold, "test", at=NOON)) for _ in range(2))
        return sum(patiently(lambda: ledger.settle(hold, till.event(hold, 20), at=NOON)) for _ in range(2))

    with ThreadPoolExecutor(12) as pool:
        assert set(pool.map(close, admitted)) == {1}
    spent = 20 * sum(int(hold.request_id.removeprefix("many-")) % 2 == 0 for hold in admitted)
    assert {till.standing(budget) for budget in made.values()} == {(spent, 0)}
    account = till.shop.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (spent, 0)


def test_group_commit_of_three_gateways_keeps_the_budget_too(till: Till, stores: list[Store]) -> None:
    budget = till.budget("project", 1000)
    commit_queue = [CommitQueue(Ledger(store)) for store in stores]
    openings = [
        commit_queue[number % 3].submit(HoldRequest(a_hold(till, number, 30), NOON, LEASE))
        for number in range(200)
    ]
    outcomes = [opening.result(60) for opening in openings]
    assert sum(outcome is True for outcome in outcomes) == 33
    assert {type(outcome) for outcome in outcomes} == {bool, BudgetExceeded}
    assert till.standing(budget) == (0, 990)
    closings = []
    for number, outcome in enumerate(outcomes):
        if outcome is True:
            event = till.event(a_hold(till, number, 30), 30)
            one = Resolution(event.request_id, "acme", NOON, event=event)
            closings += [book.submit(one) for book in commit_queue]  # each is delivered three times
    assert sum(closing.result(60) is True for closing in closings) == 33
    for book in commit_queue:
        book.stop()
    assert till.standing(budget) == (990, 0)


def test_a_budget_that_is_made_while_requests_come_and_go_misses_none_and_counts_none_twice(
    till: Till, stores: list[Store]
) -> None:
    done = threading.Event()

    def trade(worker: int) -> None:
        ledger = Ledger(stores[worker % 3])
        for number in range(40):
            hold = a_hold(till, worker * 1000 + number, 50)
            ledger.hold(hold, at=NOON, lease=LEASE)
            ledger.settle(hold, till.event(hold, 7), at=NOON)

    def manage() -> list[str]:
        made = []
        for level in ("tenant", "project", "key"):
            for period in ("day", "month", "total"):
                made.append(till.budget(level, 10**9, period))
                done.wait(0.02)
        return made

    with ThreadPoolExecutor(7) as pool:
        budgets = pool.submit(manage)
        for trading in [pool.submit(trade, worker) for worker in range(6)]:
            trading.result()
        made = budgets.result()
    with till.shop.store.read() as connection:
        total = connection.execute(sa.select(sa.func.sum(hours_table.c.cost_nanos))).scalar_one()
    assert total == 6 * 40 * 7
    assert {till.standing(budget) for budget in made} == {(total, 0)}


def test_limits_changed_and_budgets_retired_under_way_leak_nothing(till: Till, stores: list[Store]) -> None:
    first = till.budget("tenant", 2000)

    def trade(worker: int) -> int:
        ledger, spent = Ledger(stores[worker % 3]), 0
        for number in range(30):
            hold = a_hold(till, worker * 1000 + number, 60)
            try:
                ledger.hold(hold, at=NOON, lease=LEASE)
            except BudgetExceeded:
                continue
            if number % 3:
                ledger.settle(hold, till.event(hold, 11), at=NOON)
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
            made = till.budget("key", 100 * number)
            budgets.retire("acme", made, at=NOON)

    with ThreadPoolExecutor(7) as pool:
        managing = pool.submit(manage)
        spent = sum(pool.map(trade, range(6)))
        managing.result()
    assert till.standing(first) == (spent, 0)
    with till.shop.store.read() as connection:
        assert connection.execute(sa.select(sa.func.max(spend_table.c.held_nanos))).scalar_one() == 0
    assert till.shop.ledger.account("acme").held_nanos == 0
