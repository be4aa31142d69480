"""Tests the rating of a month's sums against the simplest possible calculation."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.billing.invoicing.document import InvoiceLine
from serve.billing.pricing.counting import MonthUsage
from serve.billing.pricing.plans import (
    Included,
    PricePlan,
    PriceVersion,
    Rates,
    Tax,
    TieredRates,
    Tokens,
)
from serve.billing.pricing.proration import MonthTerms, terms_of
from serve.billing.pricing.rating import minimum_lines, usage_lines
from serve.billing.pricing.tiers import (
    Graduated,
    Package,
    PackageSize,
    Step,
    Volume,
    list_price,
    price_components,
)

counts = st.integers(0, 10**10)
nanos = st.integers(0, 10**12)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, ...]:
    ends = sorted(draw(st.sets(st.integers(1, 10**9), max_size=5)))
    return tuple(Step(up_to_tokens=end, nanos_per_mtok=draw(nanos)) for end in [*ends, None])


def cost(price: object, tokens: int) -> Fraction:
    return sum((Fraction(part.micronanos, 10**6) for part in price_components(price, tokens)), Fraction(0))  # type: ignore[arg-type]


@given(steps(), counts)
def test_a_graduated_price_is_the_integral_over_its_steps(made: tuple[Step, ...], tokens: int) -> None:
    exact, begin = Fraction(0), 0
    for step in made:
        end = tokens if step.up_to_tokens is None else min(step.up_to_tokens, tokens)
        exact += max(end - begin, 0) * Fraction(step.nanos_per_mtok, 10**6)
        begin = max(begin, end)
    price = Graduated(graduated=made)
    assert cost(price, tokens) == exact <= Fraction(list_price(price) * tokens, 10**6)
    assert sum(part.quantity for part in price_components(price, tokens)) == tokens


@given(steps(), counts)
def test_a_volume_price_is_one_price_for_all_tokens(made: tuple[Step, ...], tokens: int) -> None:
    (step, *_) = [s for s in made if s.up_to_tokens is None or tokens <= s.up_to_tokens]
    price = Volume(volume=made)
    assert cost(price, tokens) == Fraction(tokens * step.nanos_per_mtok, 10**6)
    assert cost(price, tokens) <= Fraction(list_price(price) * tokens, 10**6)


@given(st.integers(1, 10**9), nanos, counts)
def test_packages_are_sold_whole(size: int, each: int, tokens: int) -> None:
    price = Package(package=PackageSize(tokens=size, nanos=each))
    assert cost(price, tokens) == each * -(-tokens // size)
    whole = tokens - tokens % size
    assert cost(price, whole) <= Fraction(list_price(price) * whole, 10**6)


FLAT = Rates(
    prompt_nanos_per_mtok=100_000_000,
    cached_prompt_nanos_per_mtok=50_000_000,
    completion_nanos_per_mtok=400_000_000,
)
STEPS = (
    Step(up_to_tokens=1_000_000, nanos_per_mtok=400_000_000),
    Step(nanos_per_mtok=300_000_000),
)
TIERED = TieredRates(
    prompt_nanos_per_mtok=100_000_000,
    cached_prompt_nanos_per_mtok=50_000_000,
    completion_nanos_per_mtok=Graduated(graduated=STEPS),
)


def version(rates: Rates | TieredRates = FLAT, **more: object) -> PriceVersion:
    said = {"name": "p", "currency": "USD", "base": rates, "adapter": rates} | more
    return PriceVersion(1, 1, PricePlan.model_validate(said))


def used(price: PriceVersion, tokens: Tokens, *, model: str = "tiny", late: str | None = None) -> MonthUsage:
    list_nanos = price.rates(adapter=False, model=model).cost_nanos(tokens)
    return MonthUsage(model, False, "default", price, 1, tokens, 0, list_nanos, late)


def whole_month(price: PriceVersion) -> MonthTerms:
    return terms_of([price] * 30, price)


@given(st.lists(st.tuples(counts, counts, counts), max_size=4), st.tuples(counts, counts, counts))
def test_a_line_is_rounded_once_and_included_tokens_are_free(
    tokens: list[tuple[int, int, int]], quota: tuple[int, int, int]
) -> None:
    price = version(TIERED)
    sums = [used(price, Tokens(p + c, c, o), model=f"m{i}") for i, (p, c, o) in enumerate(tokens)]
    included = Included(prompt_tokens=quota[0], cached_prompt_tokens=quota[1], completion_tokens=quota[2])
    lines = usage_lines(sums, included)
    for line in lines:
        exact = sum(Fraction(item.quantity * item.nanos, item.per) for item in line.items)
        assert abs(line.amount_nanos - exact) <= Fraction(1, 2)
        assert line.amount_nanos <= line.list_nanos
    items = [item for line in lines for item in line.items]
    for position, name in enumerate(("prompt tokens", "prompt tokens, cached", "completion tokens")):
        free = sum(
            item.included for item in items if item.what.split(", first")[0].split(", above")[0] == name
        )
        assert free == min(quota[position], sum(of[position] for of in tokens))


def test_a_flat_line_is_the_sum_of_what_its_requests_were_charged() -> None:
    one = MonthUsage("tiny", False, "default", version(), 3, Tokens(10, 0, 10), 0, 4_999, None)
    (line,) = usage_lines([one], Included())
    assert line.amount_nanos == line.list_nanos == 4_999


def test_included_tokens_are_spent_where_they_are_dearest_and_on_late_usage_last() -> None:
    dear = version(models={"big": {"direct": FLAT.model_copy(update={"prompt_nanos_per_mtok": 10**9})}})
    sums = [
        used(dear, Tokens(100, 0, 0), model="big", late="2026-10"),
        used(dear, Tokens(100, 0, 0), model="big"),
        used(dear, Tokens(100, 0, 0), model="tiny"),
    ]
    lines = usage_lines(sums, Included(prompt_tokens=150))
    said = {(line.model, line.late): line.items[0].included for line in lines}
    assert said == {("big", None): 100, ("tiny", None): 50, ("big", "2026-10"): 0}


@given(nanos, nanos)
def test_a_minimum_is_reached_and_never_exceeded_by_itself(minimum: int, spent: int) -> None:
    lines = [InvoiceLine(model="m", price="p v1", list_nanos=spent, amount_nanos=spent)]
    lines += minimum_lines(lines, whole_month(version(minimum_nanos=minimum)))
    assert sum(line.amount_nanos for line in lines) == max(minimum, spent)


def test_the_item_of_a_minimum_equals_its_line() -> None:
    spent = InvoiceLine(model="m", price="p v1", list_nanos=2, amount_nanos=2)
    (line,) = minimum_lines([spent], whole_month(version(minimum_nanos=3_000_000)))
    (item,) = line.items
    assert item.quantity * item.nanos == line.amount_nanos == 2_999_998
    assert item.what == "rest of the monthly minimum of 0.003 USD"


@given(st.integers(0, 10**18), st.decimals(0, 100, places=4))
def test_tax_is_rounded_half_up(taxable: int, percent: object) -> None:
    exact = Fraction(taxable) * Fraction(str(percent)) / 100
    assert -Fraction(1, 2) < Tax(name="VAT", percent=str(percent)).nanos(taxable) - exact <= Fraction(1, 2)


@pytest.mark.parametrize(
    "price",
    [
        {"graduated": []},
        {"graduated": [{"up_to_tokens": 5, "nanos_per_mtok": 1}]},
        {"volume": [{"nanos_per_mtok": 1}, {"nanos_per_mtok": 1}]},
        {"volume": [{"up_to_tokens": 5, "nanos_per_mtok": 1}] * 2 + [{"nanos_per_mtok": 1}]},
        {"package": {"tokens": 0, "nanos": 1}},
        {"package": {"tokens": 1, "nanos": 1}, "volume": [{"nanos_per_mtok": 1}]},
        1.5,
        -1,
    ],
)
def test_what_is_no_price_of_a_class_is_refused(price: object) -> None:
    with pytest.raises(ValidationError):
        TieredRates.model_validate(TIERED.model_dump() | {"prompt_nanos_per_mtok": price})
