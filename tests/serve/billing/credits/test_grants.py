"""Tests which grant pays for what, and what expires."""

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.billing.credits.grants import CREDIT_NANOS_MAX, Credits, Grant, Spend, replay
from serve.billing.invoicing.calculation import remaining_credit
from serve.billing.jobs import expire_due
from serve.billing.ledger.holds import Hold
from serve.errors import Conflict, UnknownRecord
from tests.serve.billing.invoicing.test_calculation import buy
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

DAY = timedelta(days=1)
BEGIN = datetime(2026, 11, 1, tzinfo=UTC)
days = st.integers(0, 30)


@st.composite
def grants(draw: st.DrawFn) -> list[Grant]:
    made = []
    for number in range(draw(st.integers(0, 5))):
        begin, life = draw(days), draw(st.none() | st.integers(1, 20))
        created = BEGIN + begin * DAY
        kind = draw(st.sampled_from(["prepaid", "promotional", "line"]))
        amount = draw(st.integers(1, 1000))
        expires = None if life is None else created + life * DAY
        made.append(Grant(f"g{number}", "acme", kind, amount, None, created, expires))
    return made


spends_st = st.lists(
    st.tuples(days, st.integers(0, 500)).map(
        lambda s: Spend(date(2026, 11, 1) + s[0] * DAY, "2026-11", s[1])
    ),
    max_size=12,
)


@given(grants(), spends_st)
def test_no_grant_pays_more_than_it_is_nor_outside_its_days(given_: list[Grant], spends: list[Spend]) -> None:
    applied = replay(given_, spends)
    by_id = {grant.id: grant for grant in given_}
    assert sum(applied.values()) <= sum(spend.nanos for spend in spends)
    for (grant_id, _), nanos in applied.items():
        grant = by_id[grant_id]
        payable = sum(spend.nanos for spend in spends if grant.may_pay(spend.day))
        assert 0 < nanos <= min(grant.amount_nanos, payable)
        assert grant.kind != "line"


@given(grants(), spends_st)
def test_spending_is_unpaid_only_when_every_grant_of_its_day_is_used_up(
    given_: list[Grant], spends: list[Spend]
) -> None:
    applied = replay(given_, spends)
    unpaid = sum(spend.nanos for spend in spends) - sum(applied.values())
    lasting = [g for g in given_ if g.kind != "line" and g.created_at == BEGIN and g.expires_at is None]
    if unpaid:
        for grant in lasting:
            assert applied.get((grant.id, "2026-11")) == grant.amount_nanos


@given(grants(), spends_st, st.randoms())
def test_the_order_in_which_it_is_told_does_not_matter(
    given_: list[Grant], spends: list[Spend], random: object
) -> None:
    applied = replay(given_, spends)
    random.shuffle(given_)  # type: ignore[attr-defined]
    random.shuffle(spends)  # type: ignore[attr-defined]
    assert replay(given_, spends) == applied


def test_what_expires_first_is_spent_first_and_promotions_before_prepaid_money() -> None:
    soon, late = BEGIN + 5 * DAY, BEGIN + 9 * DAY
    made = [
        Grant("for-ever", "acme", "promotional", 10, None, BEGIN),
        Grant("late", "acme", "prepaid", 10, None, BEGIN, late),
        Grant("soon-prepaid", "acme", "prepaid", 10, None, BEGIN, soon),
        Grant("soon", "acme", "promotional", 10, None, BEGIN, soon),
    ]
    applied = replay(made, [Spend(date(2026, 11, 2), "2026-11", 35)])
    assert {grant: nanos for (grant, _), nanos in applied.items()} == {
        "soon": 10,
        "soon-prepaid": 10,
        "late": 10,
        "for-ever": 5,
    }


def test_a_grant_raises_the_credit_at_once_and_what_is_left_of_it_expires_once(shop: BillingFixture) -> None:
    made = Credits(shop.store).grant("acme", 500_000, kind="prepaid", at=NOON, expires_at=NOON + DAY)
    assert made.expires_at == datetime(2026, 11, 24, tzinfo=UTC)  # the end of the day
    assert shop.ledger.account("acme").credit_nanos == 1_000_500_000
    cost = buy(shop, 1, adapter=False)
    with shop.store.read() as connection:
        assert remaining_credit(connection, "acme") == {made.id: 500_000 - cost}
    assert expire_due(shop.store, NOON + DAY) == []
    ((expired, taken),) = expire_due(shop.store, NOON + 2 * DAY)
    assert (expired.id, taken) == (made.id, 500_000 - cost)
    assert expire_due(shop.store, NOON + 3 * DAY) == []
    assert shop.ledger.account("acme").credit_nanos == 1_000_000_000 + cost


def test_what_a_request_holds_does_not_expire(shop: BillingFixture) -> None:
    shop.ledger.open_account("acme", 0)
    Credits(shop.store).grant("acme", 100, kind="promotional", at=NOON, expires_at=NOON + DAY)
    shop.ledger.hold(Hold("r", "acme", 70), at=NOON, lease=5 * DAY)
    ((_, taken),) = expire_due(shop.store, NOON + 2 * DAY)
    assert (taken, shop.ledger.account("acme").available_nanos) == (30, 0)


def test_a_grant_needs_an_account_a_future_and_bounds(shop: BillingFixture) -> None:
    credits = Credits(shop.store)
    with pytest.raises(UnknownRecord):
        credits.grant("nobody", 1, kind="prepaid", at=NOON)
    with pytest.raises(Conflict, match="future"):
        credits.grant("acme", 1, kind="prepaid", at=NOON, expires_at=NOON - DAY)
    with pytest.raises(Conflict, match="exceed"):
        credits.grant("acme", CREDIT_NANOS_MAX, kind="prepaid", at=NOON)


def test_grants_are_listed_oldest_first_in_pages(shop: BillingFixture) -> None:
    credits = Credits(shop.store)
    ids = [credits.grant("acme", 5, kind="line", at=NOON + n * DAY).id for n in range(3)]
    first = credits.page("acme", limit=2)
    assert ([grant.id for grant in first.items], first.has_more) == (ids[:2], True)
    assert [grant.id for grant in credits.page("acme", after=ids[1], limit=2).items] == ids[2:]
