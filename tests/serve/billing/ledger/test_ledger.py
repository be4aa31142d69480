"""Tests invariants 3, 4 and 7: settle or void exactly once, integers, no overshoot."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from serve.billing.invoicing.periods import periods_table
from serve.billing.ledger.accounts import transfers_table
from serve.billing.ledger.holds import Hold, HoldRequest, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.events import UsageEvent, usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.rollups import hours_table
from serve.billing.pricing.plans import Prices, Tokens
from serve.errors import InsufficientCredit
from serve.storage.database import Store
from serve.tenants import Principal, Tenants
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN
from tests.support.databases import NewDatabase
from tests.support.usage_events import usage_event

LEASE = timedelta(minutes=10)


def hold(shop: BillingFixture, request_id: str, amount_nanos: int) -> Hold:
    new_hold = Hold(request_id, "acme", amount_nanos)
    shop.ledger.hold(new_hold, at=NOON, lease=LEASE)
    return new_hold


def event(shop: BillingFixture, request_id: str, cost_nanos: int = 700) -> UsageEvent:
    return usage_event(request_id, key_id=shop.principal.key_id, plan_id=shop.price.id, cost_nanos=cost_nanos)


def test_settling_charges_the_cost_and_gives_back_the_rest_of_the_hold(shop: BillingFixture) -> None:
    made = hold(shop, "r1", 1000)
    assert shop.ledger.account("acme").held_nanos == 1000
    assert shop.ledger.settle(made, event(shop, "r1"), at=NOON)
    account = shop.ledger.account("acme")
    assert (account.held_nanos, account.spent_nanos) == (0, 700)


def test_voiding_gives_back_everything(shop: BillingFixture) -> None:
    made = hold(shop, "r1", 1000)
    assert shop.ledger.void(made, "test", at=NOON)
    account = shop.ledger.account("acme")
    assert (account.held_nanos, account.spent_nanos) == (0, 0)
    assert not shop.ledger.open_holds()


@pytest.mark.parametrize("first", ["settle", "void"])
def test_a_closed_request_cannot_be_closed_again(shop: BillingFixture, first: str) -> None:
    made = hold(shop, "r1", 1000)
    close = {
        "settle": lambda: shop.ledger.settle(made, event(shop, "r1"), at=NOON),
        "void": lambda: shop.ledger.void(made, "test", at=NOON),
    }
    assert close[first]()
    before = shop.ledger.account("acme")
    assert not close["settle"]()
    assert not close["void"]()
    assert shop.ledger.account("acme") == before


def test_a_settle_that_fails_half_way_leaves_nothing_behind(shop: BillingFixture) -> None:
    first = hold(shop, "r1", 1000)
    shop.ledger.settle(first, event(shop, "r1"), at=NOON)
    second = hold(shop, "r2", 1000)
    with pytest.raises(sa.exc.IntegrityError):
        shop.ledger.settle(second, event(shop, "r1"), at=NOON)  # an event that exists already
    assert [one.hold for one in shop.ledger.open_holds()] == [second]
    assert shop.ledger.account("acme").held_nanos == 1000


def test_a_hold_beyond_the_credit_is_refused_and_leaves_nothing_behind(shop: BillingFixture) -> None:
    with pytest.raises(InsufficientCredit) as refused:
        hold(shop, "r1", 1_000_000_001)
    assert refused.value.available_nanos == 1_000_000_000
    assert not shop.ledger.open_holds()
    assert shop.ledger.account("acme").held_nanos == 0


def test_parallel_holds_never_overshoot_the_credit(shop: BillingFixture) -> None:
    def attempt(number: int) -> bool:
        try:
            hold(shop, f"r{number}", 150_000_000)
        except InsufficientCredit:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        admitted = sum(pool.map(attempt, range(40)))
    assert admitted == 6
    assert shop.ledger.account("acme").available_nanos == 100_000_000


def test_a_hold_expires_with_its_lease(shop: BillingFixture) -> None:
    made = hold(shop, "r1", 1000)
    assert not shop.ledger.open_holds(expired_at=NOON + LEASE)
    (expired,) = shop.ledger.open_holds(expired_at=NOON + LEASE + timedelta(seconds=1))
    assert expired.hold == made


@pytest.mark.parametrize("kind", ["transfers", "usage_events"])
@pytest.mark.parametrize("change", ["UPDATE {} SET tenant_id = 'acme'", "DELETE FROM {}"])
def test_the_store_itself_refuses_to_change_what_was_written(
    shop: BillingFixture, kind: str, change: str
) -> None:
    shop.ledger.settle(hold(shop, "r1", 1000), event(shop, "r1"), at=NOON)
    with pytest.raises(sa.exc.DatabaseError, match="append-only"), shop.store.write() as connection:
        connection.exec_driver_sql(change.format(kind))


def test_many_steps_are_one_transaction_and_each_has_its_own_outcome(shop: BillingFixture) -> None:
    shop.ledger.open_account("acme", 2500)
    holds = [HoldRequest(Hold(f"r{number}", "acme", 1000), NOON, LEASE) for number in range(3)]
    *admitted, refused = shop.ledger.apply(holds)
    assert admitted == [True, True]
    assert isinstance(refused, InsufficientCredit)
    closings = [
        Resolution("r0", "acme", NOON, event=event(shop, "r0")),
        Resolution("r0", "acme", NOON, event=event(shop, "r0")),  # the same settlement, delivered twice
        Resolution("r1", "acme", NOON, reason="test"),
        Resolution("r9", "acme", NOON, reason="never held"),
    ]
    assert shop.ledger.apply(closings) == [True, False, True, False]
    account = shop.ledger.account("acme")
    assert (account.credit_nanos, account.spent_nanos, account.held_nanos) == (2500, 700, 0)


def test_the_ledger_is_double_entry(shop: BillingFixture) -> None:
    """Check that each account's balance is its credits less its debits, and that all balances add up to 0."""
    shop.ledger.settle(hold(shop, "r1", 1000), event(shop, "r1"), at=NOON)
    shop.ledger.open_account("acme", 5000)
    c = transfers_table.c
    closed = sa.select(c.debit, c.credit, c.amount_nanos).where(c.kind != "hold")
    balances: dict[str, int] = {}
    with shop.store.read() as connection:
        for row in connection.execute(closed):
            balances[row.debit] = balances.get(row.debit, 0) - row.amount_nanos
            balances[row.credit] = balances.get(row.credit, 0) + row.amount_nanos
    assert balances == {"acme": 5000 - 700, "platform": -5000, "revenue": 700}


def test_an_events_hour_and_its_engines_total_are_summed_with_its_settlement(shop: BillingFixture) -> None:
    for number in range(3):
        shop.ledger.settle(hold(shop, f"r{number}", 1000), event(shop, f"r{number}"), at=NOON)
    c = hours_table.c
    columns = (c.hour, c.period, c.model, c.requests, c.prompt_tokens, c.completion_tokens, c.cost_nanos)
    with shop.store.read() as connection:
        (row,) = connection.execute(sa.select(*columns)).all()
    assert tuple(row) == (NOON, "2026-11", "tiny", 3, 30, 15, 2100)


def test_what_is_settled_after_its_month_was_closed_belongs_to_the_next_one(shop: BillingFixture) -> None:
    with shop.store.write() as connection:
        for period in ("2026-11", "2026-12"):
            row = {"tenant_id": "acme", "period": period, "closed_at": NOON}
            connection.execute(periods_table.insert().values(row))
    shop.ledger.settle(hold(shop, "r1", 1000), event(shop, "r1"), at=NOON)
    with shop.store.read() as connection:
        assert connection.execute(sa.select(usage_table.c.period)).scalar_one() == "2027-01"


def test_totals_count_the_prompt_once_for_the_customer_and_per_sample_for_the_engine(
    shop: BillingFixture,
) -> None:
    made = hold(shop, "r1", 1000)
    one = event(shop, "r1")
    two_samples = UsageEvent(**{name: getattr(one, name) for name in one.__slots__} | {"samples": 2})
    shop.ledger.settle(made, two_samples, at=NOON)
    usage = UsageQueries(shop.store)
    assert [total.tokens for total in usage.totals()] == [Tokens(10, 4, 5)]
    assert usage.by_engine()["r", "b"].prompt_tokens == 20


class LedgerMachine(RuleBasedStateMachine):
    """Tests that the account equals the sum of its transfers after any order of actions."""

    def __init__(self, new_database: NewDatabase) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.store = Store(self.stack.enter_context(new_database()))
        self.stack.callback(self.store.close)
        tenants = Tenants(self.store, b"secret")
        tenants.create("acme", at=NOON)
        key, secret = tenants.create_key("acme", at=NOON)
        price = Prices(self.store).publish(PLAN, at=NOON)
        ledger = Ledger(self.store)
        ledger.open_account("acme", 5000)
        principal = Principal("acme", key.id, key.scopes)
        self.shop = BillingFixture(self.store, tenants, ledger, principal, secret, price)
        self.holds: list[Hold] = []

    def teardown(self) -> None:
        self.stack.close()

    @rule(amount=st.integers(0, 2000))
    def reserve(self, amount: int) -> None:
        available = self.shop.ledger.account("acme").available_nanos
        try:
            self.holds.append(hold(self.shop, f"r{len(self.holds)}", amount))
        except InsufficientCredit:
            assert amount > available

    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        if self.holds:
            made = data.draw(st.sampled_from(self.holds))
            cost = int(made.amount_nanos * share)
            self.shop.ledger.settle(made, event(self.shop, made.request_id, cost), at=NOON)

    @rule(data=st.data())
    def void(self, data: st.DataObject) -> None:
        if self.holds:
            self.shop.ledger.void(data.draw(st.sampled_from(self.holds)), "test", at=NOON)

    @rule()
    def expire(self) -> None:
        for one in self.shop.ledger.open_holds(expired_at=NOON + 2 * LEASE):
            assert self.shop.ledger.void(one.hold, "lease expired", at=NOON)

    @invariant()
    def account_is_the_sum_of_its_transfers(self) -> None:
        account = self.shop.ledger.account("acme")
        c = transfers_table.c
        with self.store.read() as connection:
            spent = connection.execute(
                sa.select(sa.func.sum(c.amount_nanos)).where(c.kind == "settle")
            ).scalar()
        assert account.spent_nanos == (spent or 0)
        assert account.held_nanos == sum(one.hold.amount_nanos for one in self.shop.ledger.open_holds())
        assert account.available_nanos >= 0


def test_the_account_is_what_the_transfers_say(new_database: NewDatabase) -> None:
    run_state_machine_as_test(
        lambda: LedgerMachine(new_database), settings=settings(max_examples=25, stateful_step_count=20)
    )
