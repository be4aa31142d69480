"""Tests that no order of actions exceeds a hard budget, leaks a hold or breaks the ledger's sums."""

import json
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from serve.billing.budgets.budgets import Budget, spend_table
from serve.billing.budgets.service import BudgetService
from serve.billing.ledger.accounts import holds_table, transfers_table
from serve.billing.ledger.holds import Hold, HoldRequest, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.events import UsageEvent
from serve.billing.pricing.plans import Prices
from serve.errors import AlreadyExists, BudgetExceeded, InsufficientCredit
from serve.storage.database import Store
from serve.tenants import Tenants
from tests.support.constants import NOON, PLAN
from tests.support.databases import NewDatabase
from tests.support.usage_events import usage_event

LEASE = timedelta(minutes=10)
START = datetime(2026, 11, 30, 23, 50, tzinfo=UTC)  # near the end of a day and a month
CREDIT = 5000


class BudgetMachine(RuleBasedStateMachine):
    """Acts with one tenant, two keys of which one is in a project, and a clock that may step back."""

    def __init__(self, new_database: NewDatabase) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.store = Store(self.stack.enter_context(new_database()))
        self.stack.callback(self.store.close)
        self.tenants = Tenants(self.store, b"secret")
        self.tenants.create("acme", at=NOON)
        self.project = self.tenants.projects.create("acme", "web", at=NOON).id
        inside = self.tenants.keys.create("acme", at=NOON, project=self.project)[0].id
        outside = self.tenants.keys.create("acme", at=NOON)[0].id
        self.keys = {inside: self.project, outside: None}
        self.subjects = [("tenant", "acme"), ("project", self.project), ("key", inside), ("key", outside)]
        self.plan_id = Prices(self.store).publish(PLAN, at=NOON).id
        self.ledger, self.budgets = Ledger(self.store), BudgetService(self.store)
        self.ledger.open_account("acme", CREDIT)
        self.at, self.count = START, 0
        self.open: dict[str, tuple[Hold, datetime]] = {}
        self.closed: list[Hold] = []
        self.created_ids: list[str] = []
        self.over_limit: set[str] = set()  # soft for a time, lowered, or made when more was spent already

    def teardown(self) -> None:
        self.stack.close()

    @rule(minutes=st.sampled_from([1, 9, 11, 60, 1440, -1, -11, -1440]))
    def time_passes_or_goes_back(self, minutes: int) -> None:
        self.at += timedelta(minutes=minutes)

    @rule(data=st.data(), amounts=st.lists(st.integers(0, 900), min_size=1, max_size=4))
    def reserve(self, data: st.DataObject, amounts: list[int]) -> None:
        """Take several holds in one transaction, as group commit does."""
        openings = []
        for amount in amounts:
            self.count += 1
            key = data.draw(st.sampled_from(list(self.keys)))
            terms = json.dumps({"key_id": key, "project": self.keys[key]})
            hold = Hold(f"r{self.count}", "acme", amount, self.keys[key], key, terms)
            openings.append(HoldRequest(hold, self.at, LEASE))
        account = self.ledger.account("acme")
        left = account.available_nanos
        for opening, outcome in zip(openings, self.ledger.apply(openings), strict=True):
            if outcome is True:
                self.open[opening.hold.request_id] = (opening.hold, self.at)
                left -= opening.hold.amount_nanos
            elif isinstance(outcome, BudgetExceeded):
                # A budget beyond its limit reports nothing left.
                assert outcome.available_nanos < max(opening.hold.amount_nanos, 1)
            else:
                assert isinstance(outcome, InsufficientCredit)
                assert opening.hold.amount_nanos > left

    @precondition(lambda self: self.open)
    @rule(data=st.data(), share=st.floats(0, 1), twice=st.booleans(), void=st.booleans())
    def close(self, data: st.DataObject, share: float, twice: bool, void: bool) -> None:
        hold, _ = self.open.pop(data.draw(st.sampled_from(sorted(self.open))))
        event = None if void else self.event(hold, int(hold.amount_nanos * share))
        closing = Resolution(hold.request_id, "acme", self.at, event=event, reason="test" if void else None)
        outcomes = self.ledger.apply([closing] * (2 if twice else 1))
        assert outcomes == [True, False][: len(outcomes)]
        self.closed.append(hold)

    @precondition(lambda self: self.closed)
    @rule(data=st.data())
    def deliver_again(self, data: st.DataObject) -> None:
        hold = data.draw(st.sampled_from(self.closed))
        assert not self.ledger.settle(hold, self.event(hold, hold.amount_nanos), at=self.at)
        assert not self.ledger.void(hold, "again", at=self.at)

    @rule()
    def leases_run_out(self) -> None:
        for expired in self.ledger.open_holds(expired_at=self.at):
            hold = expired.hold
            assert self.ledger.void(hold, "expired", at=self.at)
            self.closed.append(self.open.pop(hold.request_id)[0])

    @rule(
        subject=st.integers(0, 3),
        period=st.sampled_from(["day", "month", "total"]),
        limit=st.integers(0, 3000),
        hard=st.booleans(),
    )
    def make_a_budget(self, subject: int, period: str, limit: int, hard: bool) -> None:
        try:
            made = self.budgets.create("acme", *self.subjects[subject], period, limit, at=self.at, hard=hard)
        except AlreadyExists:
            return
        self.created_ids.append(made.budget.id)
        mine = [row for row in self.spend() if row.budget_id == made.budget.id]
        if not hard or any(row.spent_nanos + row.held_nanos > limit for row in mine):
            self.over_limit.add(made.budget.id)

    @rule(data=st.data(), limit=st.integers(0, 4000), hard=st.booleans())
    def change_a_budget(self, data: st.DataObject, limit: int, hard: bool) -> None:
        living = self.living()
        if living:
            budget = data.draw(st.sampled_from(living))
            if limit < budget.limit_nanos or not hard:
                self.over_limit.add(budget.id)
            self.budgets.change("acme", budget.id, {"limit_nanos": limit, "hard": hard}, at=self.at)

    @rule(data=st.data())
    def retire_a_budget(self, data: st.DataObject) -> None:
        living = self.living()
        if living:
            self.budgets.retire("acme", data.draw(st.sampled_from(living)).id, at=self.at)

    @invariant()
    def no_hard_budget_is_overshot(self) -> None:
        budgets = {one.budget.id: one.budget for one in self.budgets.page("acme", at=self.at).items}
        for row in self.spend():
            budget = budgets[row.budget_id]
            assert row.spent_nanos >= 0
            if budget.hard and budget.id not in self.over_limit:
                assert row.spent_nanos + row.held_nanos <= budget.limit_nanos

    @invariant()
    def what_budgets_hold_is_what_the_open_holds_took_there(self) -> None:
        taken: dict[tuple[str, str], int] = {}
        with self.store.read() as connection:
            for row in connection.execute(sa.select(holds_table)):
                for place in json.loads(row.budgets or "[]"):
                    taken[tuple(place)] = taken.get(tuple(place), 0) + row.amount_nanos
        held = {(row.budget_id, row.period): row.held_nanos for row in self.spend() if row.held_nanos}
        assert held == {place: amount for place, amount in taken.items() if amount}

    @invariant()
    def every_budget_in_force_holds_all_that_its_subject_has_open(self) -> None:
        for budget in self.living():
            mine = sum(
                hold.amount_nanos
                for hold, _ in self.open.values()
                if budget.binds("acme", hold.project, hold.key_id)
            )
            assert sum(row.held_nanos for row in self.spend() if row.budget_id == budget.id) == mine

    @invariant()
    def the_account_is_the_sum_of_its_transfers(self) -> None:
        account = self.ledger.account("acme")
        c = transfers_table.c
        with self.store.read() as connection:
            query = sa.select(c.kind, sa.func.sum(c.amount_nanos)).group_by(c.kind)
            sums = {kind: int(total) for kind, total in connection.execute(query)}
        assert account.spent_nanos == sums.get("settle", 0)
        assert account.credit_nanos == sums.get("grant", 0) == CREDIT
        assert account.held_nanos == sum(hold.amount_nanos for hold, _ in self.open.values())
        assert account.available_nanos >= 0
        assert {one.hold.request_id for one in self.ledger.open_holds()} == self.open.keys()

    def living(self) -> list[Budget]:
        """Return live budgets in order of creation, which their ids and times do not give."""
        found = {one.budget.id: one.budget for one in self.budgets.page("acme", at=self.at).items}
        return [found[one] for one in self.created_ids if found[one].retired_at is None]

    def spend(self) -> "list[sa.Row[tuple[str, str, int, int, int]]]":
        with self.store.read() as connection:
            return list(connection.execute(sa.select(spend_table)))

    def event(self, hold: Hold, cost_nanos: int) -> UsageEvent:
        assert hold.key_id is not None
        return usage_event(
            hold.request_id,
            key_id=hold.key_id,
            plan_id=self.plan_id,
            at=self.at,
            project=hold.project,
            cost_nanos=cost_nanos,
        )


def test_budgets_and_credit_hold_whatever_happens_in_whatever_order(new_database: NewDatabase) -> None:
    run_state_machine_as_test(
        lambda: BudgetMachine(new_database),
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
