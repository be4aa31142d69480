"""Tests that a month's minimum and included tokens are divided by days without remainder."""

import calendar
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.billing.invoicing.periods import period_bounds
from serve.billing.pricing.plans import Included, PricePlan, Prices, PriceVersion
from serve.billing.pricing.proration import MonthTerms, month_terms, prorated, terms_of
from serve.billing.pricing.tables import subscriptions_table
from serve.errors import UnknownRecord
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN

DAY = timedelta(days=1)
quantities = st.integers(0, 10**15)


def version(id: int = 1, **fields: object) -> PriceVersion:
    return PriceVersion(id, id, PricePlan.model_validate(PLAN.model_dump() | fields))


@given(quantities, st.integers(28, 31), st.lists(st.integers(0, 31)))
def test_the_shares_of_all_days_add_up_to_the_whole(quantity: int, days: int, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, days) for cut in cuts), days]
    shares = [prorated(quantity, begin, end, days) for begin, end in itertools.pairwise(bounds)]
    assert sum(shares) == quantity
    for share, (begin, end) in zip(shares, itertools.pairwise(bounds), strict=True):
        assert abs(share - Fraction(quantity * (end - begin), days)) < 1 or share == 0
        assert 0 <= share <= quantity


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=30, max_size=30))
def test_each_version_gives_the_share_of_its_days(days: Sequence[int]) -> None:
    versions = [
        version(id, proration="day", minimum_nanos=id * 30_000, included={"prompt_tokens": id * 300})
        for id in (1, 2)
    ]
    terms = terms_of([versions[id - 1] if id else None for id in days], versions[0])
    assert terms.minimum_nanos == sum(id * 1_000 for id in days)
    assert terms.included == Included(prompt_tokens=sum(id * 10 for id in days))
    assert {share.price.id: share.days for share in terms.shares} == {
        id: days.count(id) for id in (1, 2) if id in days
    }


@given(quantities, quantities, st.integers(1, 30))
def test_without_proration_the_last_version_gives_its_whole_minimum(old: int, new: int, day: int) -> None:
    before, after = version(1, minimum_nanos=old, proration="day"), version(2, minimum_nanos=new)
    in_force = [before] * day + [after] * (31 - day)
    assert terms_of(in_force, after).minimum_nanos == new


def terms(shop: BillingFixture, period: str) -> MonthTerms:
    with shop.store.read() as connection:
        return month_terms(Prices(shop.store).by_id(connection), connection, "acme", *period_bounds(period))


def test_a_day_belongs_to_the_version_in_force_at_its_end(shop: BillingFixture) -> None:
    prices, minimum = Prices(shop.store), 31_000_000_000
    for name, factor in (("small", 1), ("large", 2)):
        fields = {"name": name, "proration": "day", "minimum_nanos": factor * minimum}
        prices.publish(PricePlan.model_validate(PLAN.model_dump() | fields), at=NOON)
    january = datetime(2027, 1, 1, tzinfo=UTC)
    prices.subscribe("acme", "small", at=january - timedelta(seconds=1))
    prices.subscribe("acme", "large", at=january + timedelta(days=10, hours=23))
    prices.subscribe("acme", "small", at=january + timedelta(days=20))
    december, whole = terms(shop, "2026-12"), terms(shop, "2027-01")
    shares = [(share.price.plan.name, share.days, share.minimum_nanos) for share in december.shares]
    assert shares == [("standard", 30, 0), ("small", 1, minimum // 31)]
    assert [(share.price.plan.name, share.days) for share in whole.shares] == [("small", 21), ("large", 10)]
    assert whole.minimum_nanos == (21 + 2 * 10) * minimum // 31
    assert terms(shop, "2027-02").minimum_nanos == minimum
    assert terms(shop, "2026-10").shares == ()


def test_a_plan_that_ends_gives_the_share_of_its_days_and_is_in_force_no_more(shop: BillingFixture) -> None:
    prices, minimum = Prices(shop.store), 31_000_000_000
    january = datetime(2027, 1, 1, tzinfo=UTC)
    for proration in ("day", "none"):
        fields = {"name": proration, "proration": proration, "minimum_nanos": minimum}
        prices.publish(PricePlan.model_validate(PLAN.model_dump() | fields), at=NOON)
        prices.subscribe("acme", proration, at=january)
        end = january + timedelta(days=9, hours=23)
        assert prices.end("acme", at=end).plan.name == proration
        with shop.store.read() as connection:
            (before, after) = (prices.at(connection, "acme", at) for at in (end - DAY, end))
            assert (before and before.plan.name, after) == (proration, None)
        last_month = terms(shop, "2027-01")
        assert last_month.minimum_nanos == (minimum * 9 // 31 if proration == "day" else minimum)
        assert [share.days for share in last_month.shares][-1] == 9
        next_month = terms(shop, "2027-02")
        assert (next_month.shares, next_month.price) == ((), before)  # for late usage: its tax
        with pytest.raises(UnknownRecord):
            prices.end("acme", at=end)
        with shop.store.write() as connection:
            connection.execute(subscriptions_table.delete())


@pytest.mark.parametrize("days", sorted({calendar.monthrange(2027, month)[1] for month in range(1, 13)}))
def test_a_month_in_force_from_its_first_to_its_last_day_is_whole(days: int) -> None:
    price = version(proration="day", minimum_nanos=31, included={"completion_tokens": 7})
    whole = terms_of([price] * days, price)
    assert (whole.minimum_nanos, whole.included.completion_tokens) == (31, 7)


@pytest.mark.parametrize(
    "fields", [{"proration": "week"}, {"proration": None}, {"tiers_over": "models"}, {"tiers_over": 1}]
)
def test_another_choice_is_refused_by_the_name_of_its_field(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        PricePlan.model_validate(PLAN.model_dump() | fields)
