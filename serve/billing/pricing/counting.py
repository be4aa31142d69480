"""Counts a month's tokens: which are included, and which share the steps of a tiered price.

A plan's `tiers_over` says which tokens of one month of use are counted together, each token class by itself:

model   of one base, or of one adapter under its alias and all its versions; batches by themselves
kind    of all bases, or of all adapters; batches by themselves
all     of all models, batches with direct requests

Price versions never divide what is counted together, and late usage follows what its month was billed before.
Within what is counted together, earlier price versions come first, then what is dearest at list price. So the
sums decide where a token is counted: neither the order of the events nor the names of models do.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve.billing.pricing.plans import Included, PriceVersion, Rates, TieredRates, Tokens
from serve.billing.pricing.tiers import Graduated, Package, Volume, list_price

PROMPT, CACHED, COMPLETION = "prompt tokens", "prompt tokens, cached", "completion tokens"
CLASSES = {
    PROMPT: "prompt_nanos_per_mtok",
    CACHED: "cached_prompt_nanos_per_mtok",
    COMPLETION: "completion_nanos_per_mtok",
}

CountedTogether = tuple[str, ...]  # the month of use ("": the invoice's own), the token class and the scope
ClassCounts = Mapping[str, int]  # by token class


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """Sums a month's usage of one model and tier under one price version. `late` is as in `InvoiceLine`."""

    model: str
    adapter: bool
    tier: str
    price: PriceVersion
    requests: int
    tokens: Tokens
    cold_loads: int
    list_nanos: int
    late: str | None = None

    @property
    def month_rates(self) -> Rates | TieredRates:
        return self.price.plan.month_rates(model=self.model, adapter=self.adapter, batch=self.tier == "batch")

    @property
    def counts(self) -> ClassCounts:
        return {
            PROMPT: self.tokens.uncached,
            CACHED: self.tokens.cached,
            COMPLETION: self.tokens.completion,
        }

    def counted_together(self, token_class: str, over: str) -> CountedTogether:
        """Return the key of the tokens that share steps with these if tiers count over `over`."""
        scopes: Mapping[str, CountedTogether] = {
            "model": (self.tier, self.model.partition("@")[0]),
            "kind": (self.tier, "adapter" if self.adapter else "base"),
            "all": (),
        }
        return (self.late or "", token_class, over, *scopes[over])


@dataclass(frozen=True, slots=True)
class Position:
    """Places a sum's tokens among those counted together: `before` come first, `total` are all of them."""

    before: int = 0
    total: int = 0


def included_tokens(sums: Sequence[MonthUsage], included: Included) -> list[ClassCounts]:
    """Return the number of included tokens of each sum.

    They are used first where tokens are dearest, and on late usage last.
    """
    quotas = (included.prompt_tokens, included.cached_prompt_tokens, included.completion_tokens)
    shares = [dict.fromkeys(CLASSES, 0) for _ in sums]
    for (name, field), quota in zip(CLASSES.items(), quotas, strict=True):
        if quota:
            negated_prices = [-list_price(getattr(month_usage.month_rates, field)) for month_usage in sums]
            for i in sorted(range(len(sums)), key=lambda i: (sums[i].late or "", negated_prices[i], i)):
                shares[i][name] = min(quota, sums[i].counts[name])
                quota -= shares[i][name]
    return list(shares)


def positions(
    sums: Sequence[MonthUsage], free: Sequence[ClassCounts], earlier: Mapping[CountedTogether, int]
) -> list[Mapping[str, Position]]:
    """Return the position of each sum's tokens, by token class. Included tokens (`free`) are not counted.

    `earlier` counts the tokens that earlier invoices billed of the months of late usage.
    """
    totals, before = Counter(earlier), Counter(earlier)
    for month_usage, free_tokens in zip(sums, free, strict=True):
        totals.update(_counted(month_usage, free_tokens))
    placed: list[dict[str, Position]] = [{} for _ in sums]
    for name, field in CLASSES.items():
        for i in sorted(range(len(sums)), key=lambda i: (_rank(sums[i], field), i)):
            key = sums[i].counted_together(name, sums[i].price.plan.tiers_over)
            placed[i][name] = Position(before[key], totals[key])
            before.update(_counted(sums[i], free[i], (name,)))
    return list(placed)


def billed_tokens(sums: Sequence[MonthUsage], included: Included, period: str) -> Counter[CountedTogether]:
    """Return what the invoice of `period` counts, by month of use, for the late usage on later invoices."""
    counted: Counter[CountedTogether] = Counter()
    for month_usage, free_tokens in zip(sums, included_tokens(sums, included), strict=True):
        of_month = replace(month_usage, late=month_usage.late or period)
        counted.update(_counted(of_month, free_tokens))
    return counted


def _counted(
    month_usage: MonthUsage, free_tokens: ClassCounts, classes: Sequence[str] = tuple(CLASSES)
) -> Counter[CountedTogether]:
    """Count the tokens in every scope, because each price version may count over another."""
    return Counter(
        {
            month_usage.counted_together(name, over): month_usage.counts[name] - free_tokens[name]
            for name in classes
            for over in ("model", "kind", "all")
        }
    )


def _rank(month_usage: MonthUsage, field: str) -> tuple[int, int, str]:
    price: int | Graduated | Volume | Package = getattr(month_usage.month_rates, field)
    return (month_usage.price.id, -list_price(price), str(price))
