"""Tests which tokens share the steps of a price, against a count of one token after another."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.billing.invoicing.document import InvoiceLine
from serve.billing.pricing.counting import CountedTogether, MonthUsage, billed_tokens
from serve.billing.pricing.plans import Included, PricePlan, PriceVersion, Tokens
from serve.billing.pricing.rating import usage_lines
from serve.billing.pricing.tiers import Graduated, Package, PackageSize, Step, Volume, price_components

FREE = Included()
OVER = ("model", "kind", "all")
tokens_st = st.integers(0, 40)
prices_st = st.integers(0, 10**9)


@st.composite
def steps(draw: st.DrawFn) -> tuple[Step, ...]:
    ends = sorted(draw(st.sets(st.integers(1, 60), max_size=3)))
    return tuple(Step(up_to_tokens=end, nanos_per_mtok=draw(prices_st)) for end in [*ends, None])


graduated_st = st.builds(Graduated, graduated=steps())
volume_st = st.builds(Volume, volume=steps())
package_st = st.builds(Package, package=st.builds(PackageSize, tokens=st.integers(1, 30), nanos=prices_st))
price_st = st.one_of(graduated_st, volume_st, package_st, prices_st)


def version(price: object, *, over: str = "all", id: int = 1, **more: object) -> PriceVersion:
    """Price all token classes of all models at `price`."""
    rates = dict.fromkeys(
        ("prompt_nanos_per_mtok", "cached_prompt_nanos_per_mtok", "completion_nanos_per_mtok"), price
    )
    plan = {"name": "p", "base": rates, "adapter": rates, "tiers_over": over} | more
    return PriceVersion(id, id, PricePlan.model_validate(plan))


def used(
    price: PriceVersion,
    completion: int,
    model: str = "tiny",
    *,
    tier: str = "default",
    late: str | None = None,
) -> MonthUsage:
    adapter, tokens = "/" in model, Tokens(0, 0, completion)
    rates = price.rates(model=model, adapter=adapter, batch=tier == "batch")
    return MonthUsage(model, adapter, tier, price, 1, tokens, 0, rates.cost_nanos(tokens), late)


def cost(lines: Sequence[InvoiceLine]) -> Fraction:
    """Return the exact sum of the lines' items."""
    return sum((Fraction(i.quantity * i.nanos, i.per) for line in lines for i in line.items), Fraction(0))


def cost_of(price: Any, tokens: int) -> Fraction:
    return sum((Fraction(part.micronanos, 10**6) for part in price_components(price, tokens)), Fraction(0))


@given(price_st, st.lists(tokens_st, max_size=6))
def test_parts_that_follow_each_other_cost_what_the_whole_costs(price: Any, parts: list[int]) -> None:
    total, before, whole = sum(parts), 0, Fraction(0)
    for tokens in parts:
        components = price_components(price, tokens, before=before, total=total)
        whole += sum(Fraction(part.micronanos, 10**6) for part in components)
        before += tokens
    assert whole == cost_of(price, total)


usages_st = st.lists(
    st.tuples(
        st.sampled_from(["tiny", "other", "acme/a", "acme/a@1", "acme/b"]),
        st.sampled_from(["default", "batch"]),
        st.sampled_from([1, 2, 3]),
        tokens_st,
    ),
    max_size=8,
    unique_by=lambda usage: usage[:3],
)


@given(price_st, usages_st, st.randoms())
def test_over_all_a_month_costs_the_same_however_it_is_split_and_ordered(
    price: Any, usages: list[tuple[str, str, int, int]], random: Any
) -> None:
    sums = [used(version(price, id=id), n, model, tier=tier) for model, tier, id, n in usages]
    lines = usage_lines(sums, FREE)
    assert cost(lines) == cost_of(price, sum(n for *_, n in usages))
    assert abs(sum(line.amount_nanos for line in lines) - cost(lines)) <= len(lines)
    random.shuffle(sums)
    assert usage_lines(sums, FREE) == lines


def scope(usage: MonthUsage) -> Mapping[str, object]:
    name = usage.model.split("@")[0]
    return {"model": (name, usage.tier), "kind": (usage.adapter, usage.tier), "all": None}


@given(st.lists(st.tuples(graduated_st, st.sampled_from(OVER)), min_size=3, max_size=3), usages_st, tokens_st)
@settings(max_examples=60)
def test_each_token_pays_the_step_that_a_count_of_one_after_another_reaches(
    scales: list[tuple[Graduated, str]], usages: list[tuple[str, str, int, int]], free: int
) -> None:
    sums = [
        used(version(scales[id - 1][0], over=scales[id - 1][1], id=id), n, model, tier=tier)
        for model, tier, id, n in usages
    ]
    lines = usage_lines(sums, Included(completion_tokens=free))
    by_line = {(line.model, line.tier, line.plan_id): line for line in lines}
    expected, counted = Fraction(0), Counter[object]()
    for usage in sorted(sums, key=lambda u: (u.price.id, u.model, u.tier == "batch")):
        line = by_line[usage.model, usage.tier, usage.price.id]
        scale, over = scales[usage.price.id - 1]
        for _ in range(usage.tokens.completion - sum(item.included for item in line.items)):
            position = counted[over, scope(usage)[over]] + 1
            step = next(s for s in scale.graduated if s.up_to_tokens is None or position <= s.up_to_tokens)
            expected += Fraction(step.nanos_per_mtok, 10**6)
            counted.update([(name, scope(usage)[name]) for name in OVER])
    assert cost(lines) == expected


@given(
    st.one_of(graduated_st, package_st), st.sampled_from(OVER), st.lists(tokens_st, min_size=1, max_size=4)
)
def test_late_usage_costs_what_it_would_have_cost_in_time(price: Any, over: str, parts: list[int]) -> None:
    plan, (own, *late), earlier = version(price, over=over), parts, Counter[CountedTogether]()
    lines, usages = [], [used(plan, own), *(used(plan, n, late="2026-10") for n in late)]
    for month, usage in enumerate(usages, 10):  # each late part is on the invoice of another month
        others = [used(plan, 7)] if month > 10 else []
        rated = usage_lines([usage, *others], FREE, earlier)
        lines += [line for line in rated if month == 10 or line.late]
        earlier.update(billed_tokens([usage, *others], FREE, f"2026-{month}"))
    assert cost(lines) == cost_of(price, sum(parts))


def test_late_usage_pays_the_volume_that_its_month_reaches_with_it() -> None:
    price = Volume(volume=(Step(up_to_tokens=10, nanos_per_mtok=5 * 10**6), Step(nanos_per_mtok=3 * 10**6)))
    plan, own = version(price), used(version(price), 10)
    earlier = billed_tokens([own], FREE, "2026-10")
    (late,) = usage_lines([used(plan, 2, "acme/b", late="2026-10")], FREE, earlier)
    assert (late.amount_nanos, late.tiers_over) == (2 * 3, "all")
    assert late.items[-1].counted is not None
    assert late.items[-1].note == "after 10 of 12 counted together"


def test_included_tokens_of_the_month_that_was_billed_count_in_no_step() -> None:
    price = Graduated(graduated=(Step(up_to_tokens=10, nanos_per_mtok=10**6), Step(nanos_per_mtok=0)))
    plan = version(price, over="model")
    earlier = billed_tokens([used(plan, 12)], Included(completion_tokens=5), "2026-10")
    (late,) = usage_lines([used(plan, 4, late="2026-10")], FREE, earlier)
    assert late.amount_nanos == 3  # of the first ten, seven had been billed


@pytest.mark.parametrize(
    ("over", "amounts"),
    [
        # the alias, its version, its batch, another adapter, a base: the first ten tokens cost 1 each
        ("model", {"acme/a": 8, "acme/a@1": 2, "batch": 8, "acme/b": 8, "tiny": 8}),
        ("kind", {"acme/a": 8, "acme/a@1": 2, "batch": 8, "acme/b": 0, "tiny": 8}),
        ("all", {"acme/a": 8, "acme/a@1": 2, "batch": 0, "acme/b": 0, "tiny": 0}),
    ],
)
def test_the_plan_chooses_what_is_counted_together(over: str, amounts: Mapping[str, int]) -> None:
    price = Graduated(graduated=(Step(up_to_tokens=10, nanos_per_mtok=10**6), Step(nanos_per_mtok=0)))
    plan = version(price, over=over)
    sums = [used(plan, 8, model) for model in ("acme/a", "acme/a@1", "acme/b", "tiny")]
    lines = usage_lines([*sums, used(plan, 8, "acme/a", tier="batch")], FREE)
    paid = {"batch" if line.tier == "batch" else line.model: line.amount_nanos for line in lines}
    if over == "all":  # in the order of the lines
        assert (sum(paid.values()), paid["acme/a"]) == (10, 8)
    else:
        assert paid == amounts


@given(
    st.lists(st.tuples(st.one_of(graduated_st, volume_st, prices_st), tokens_st), min_size=2, max_size=4),
    st.permutations(["a", "b", "c", "d"]),
)
def test_models_with_prices_of_their_own_cost_together_the_same_under_other_names(
    models: list[tuple[Any, int]], names: list[str]
) -> None:
    def rated(names: Sequence[str]) -> Fraction:
        own = {
            name: {"direct": version(price).plan.base.model_dump()}
            for name, (price, _) in zip(names, models, strict=False)
        }
        plan = version(0, models=own)
        sums = [used(plan, n, name) for name, (_, n) in zip(names, models, strict=False)]
        return cost(usage_lines(sums, FREE))

    assert rated(names) == rated("abcd")


@given(st.one_of(graduated_st, volume_st, prices_st), st.sampled_from(OVER), usages_st, tokens_st)
def test_no_line_costs_more_than_its_requests_at_list_price(
    price: Any, over: str, usages: list[tuple[str, str, int, int]], before: int
) -> None:
    sums = [used(version(price, over=over, id=id), n, model, tier=tier) for model, tier, id, n in usages]
    sums = [replace(usage, late="2026-10") for usage in sums]
    earlier = billed_tokens([used(version(price), before)], FREE, "2026-10")
    for line in usage_lines(sums, FREE, earlier):
        assert line.amount_nanos <= line.list_nanos


@given(package_st, usages_st, tokens_st)
def test_a_line_of_packages_costs_less_than_one_package_above_list_price(
    price: Package, usages: list[tuple[str, str, int, int]], before: int
) -> None:
    sums = [used(version(price, id=id), n, model, tier=tier) for model, tier, id, n in usages]
    sums = [replace(usage, late="2026-10") for usage in sums]
    earlier = billed_tokens([used(version(price), before)], FREE, "2026-10")
    for line in usage_lines(sums, FREE, earlier):
        assert line.amount_nanos <= line.list_nanos + price.package.nanos
