"""Tests invariant 4: money is integers and is rounded once, per event."""

import json
from datetime import timedelta
from fractions import Fraction
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.billing.money import digits, exact, nanos_of, rounded
from serve.billing.pricing.plans import (
    BatchRates,
    PricePlan,
    Prices,
    Rates,
    Tokens,
    read_plan,
)
from serve.billing.pricing.tables import plans_table
from serve.errors import UnknownRecord
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import CONFIGS, NOON, PLAN

prices_st = st.integers(0, 10**12)
counts_st = st.integers(0, 10**6)


@given(prices_st, prices_st, prices_st, counts_st, counts_st, counts_st)
def test_a_cost_is_the_exact_sum_rounded_once(
    a: int, b: int, c: int, fresh: int, cached: int, out: int
) -> None:
    rates = Rates(prompt_nanos_per_mtok=a, cached_prompt_nanos_per_mtok=b, completion_nanos_per_mtok=c)
    exact = Fraction(a * fresh + b * cached + c * out, 1_000_000)
    cost = rates.cost_nanos(Tokens(fresh + cached, cached, out))
    assert abs(cost - exact) <= Fraction(1, 2)


@given(prices_st, prices_st, prices_st, counts_st, counts_st, counts_st)
def test_no_request_costs_more_than_the_hold_for_its_bounds(
    a: int, b: int, c: int, x: int, y: int, z: int
) -> None:
    rates = Rates(prompt_nanos_per_mtok=a, cached_prompt_nanos_per_mtok=b, completion_nanos_per_mtok=c)
    assert rates.cost_nanos(Tokens(x + y, y, z)) <= rates.cost_nanos_max(x + y, z)


@given(st.integers(-(10**17), 10**17))
def test_an_amount_survives_being_written_and_read(nanos: int) -> None:
    assert nanos_of(exact(nanos, "USD")) == nanos


@pytest.mark.parametrize("text", ["", "a", "1e400", "NaN", "0.0000000001", "1000000000000000"])
def test_what_is_no_amount_in_whole_nanos_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an amount"):
        nanos_of(text)


def test_cents_are_rounded_half_to_even() -> None:
    assert [rounded(n, "USD") for n in (5_000_000, 15_000_000, 25_000_001)] == ["0.00", "0.02", "0.03"]


def test_publishing_an_unchanged_plan_makes_no_new_version(shop: BillingFixture) -> None:
    prices = Prices(shop.store)
    assert prices.publish(PLAN, at=NOON).version == 1
    dearer = PLAN.model_copy(update={"base": PLAN.base.model_copy(update={"prompt_nanos_per_mtok": 1})})
    assert prices.publish(dearer, at=NOON).version == 2
    assert prices.publish(dearer, at=NOON).version == 2


def test_the_price_in_force_is_the_one_at_the_requests_time(shop: BillingFixture) -> None:
    prices = Prices(shop.store)
    dearer = PLAN.model_copy(update={"base": PLAN.base.model_copy(update={"prompt_nanos_per_mtok": 1})})
    prices.publish(dearer, at=NOON)
    prices.subscribe("acme", "standard", at=NOON + timedelta(hours=1))
    with shop.store.read() as connection:
        versions = [
            prices.at(connection, "acme", NOON + timedelta(minutes=minutes)) for minutes in (-1, 0, 59, 60)
        ]
    assert [version and version.version for version in versions] == [None, 1, 1, 2]


def test_a_batch_has_prices_of_its_own_or_else_the_ordinary_ones(shop: BillingFixture) -> None:
    cheap = PLAN.base.model_copy(update={"prompt_nanos_per_mtok": 1})
    plan = PLAN.model_copy(update={"batch": BatchRates(base=cheap, adapter=PLAN.adapter)})
    assert plan.rates(adapter=False, batch=True) == cheap
    assert plan.rates(adapter=False) == PLAN.base
    assert shop.price.rates(adapter=False, batch=True) == shop.price.rates(adapter=False)


def test_a_plan_without_batch_prices_is_stored_as_it_was_before_there_were_any(shop: BillingFixture) -> None:
    rates = {name: nanos for name, nanos in PLAN.base.model_dump().items() if name != "cold_load_nanos"}
    before = {"name": "standard", "currency": "USD", "base": rates, "adapter": rates}
    with shop.store.read() as connection:
        document = connection.execute(sa.select(plans_table.c.document)).scalar_one()
    assert document == json.dumps(before, sort_keys=True)
    assert PricePlan.model_validate_json(document) == PLAN


def test_our_own_batch_prices_are_half() -> None:
    plan = read_plan(CONFIGS / "prices" / "standard.yaml")
    for adapter in (False, True):
        half = plan.rates(adapter=adapter, batch=True).model_dump()
        assert {name: 2 * nanos for name, nanos in half.items()} == plan.rates(adapter=adapter).model_dump()


def test_an_unknown_plan_or_tenant_is_named(shop: BillingFixture) -> None:
    with pytest.raises(UnknownRecord, match="gold"):
        Prices(shop.store).subscribe("acme", "gold", at=NOON)
    with pytest.raises(UnknownRecord, match="nobody"):
        Prices(shop.store).subscribe("nobody", "standard", at=NOON)


@pytest.mark.parametrize("path", [CONFIGS / "prices" / "standard.yaml", CONFIGS / "demo" / "prices.yaml"])
def test_the_plans_that_we_ship_are_valid(path: Path) -> None:
    assert read_plan(path).currency == "USD"


def test_everything_wrong_with_a_plan_is_said_at_once(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text("name: x\ncurrency: dollars\nbase: {prompt_nanos_per_mtok: 0.5}\nfoo: 1\n")
    with pytest.raises(ValidationError) as wrong:
        read_plan(file)
    assert {error["loc"][0] for error in wrong.value.errors()} == {"currency", "base", "adapter", "foo"}


@pytest.mark.parametrize("day", [0, 20261201, "0", "soon", "2026-12-01T00:00:00"])
def test_a_day_is_written_as_one(day: object) -> None:
    with pytest.raises(ValidationError):
        PricePlan.model_validate(PLAN.model_dump() | {"effective_from": day})


@pytest.mark.parametrize(
    ("currency", "digits_expected", "text"),
    [("USD", 2, "1.00"), ("JPY", 0, "1"), ("KWD", 3, "1.000"), ("TND", 3, "1.000"), ("CLF", 4, "1.0000")],
)
def test_an_amount_has_its_currencys_decimals(currency: str, digits_expected: int, text: str) -> None:
    assert digits(currency) == digits_expected
    assert exact(10**9, currency) == text
    assert rounded(10**9 + 1, currency) == text


@pytest.mark.parametrize("currency", ["DEM", "HRK", "ABC", "XAU", "XXX", "XTS", "usd", "EURO", ""])
def test_a_plan_in_no_currency_that_money_is_counted_in_is_refused(currency: str) -> None:
    with pytest.raises(ValidationError):
        PricePlan.model_validate(PLAN.model_dump() | {"currency": currency})
