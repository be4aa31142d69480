"""Rates a month's sums: computes invoice lines from usage and charges.

Rating is pure and uses integers: the same sums always give the same lines. A line is rounded once, half up
to the nano. If every price is flat and no tokens are included, the line is the sum of the events' own costs,
each rounded when it was charged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.billing.invoicing.document import InvoiceLine, LineItem
from serve.billing.money import labelled
from serve.billing.pricing.plans import Included, PriceVersion, Rates, TieredRates, Tokens
from serve.billing.pricing.tiers import MTOK, PriceComponent, list_price, price_components

PROMPT, CACHED, COMPLETION = "prompt tokens", "prompt tokens, cached", "completion tokens"
CLASSES = {
    PROMPT: "prompt_nanos_per_mtok",
    CACHED: "cached_prompt_nanos_per_mtok",
    COMPLETION: "completion_nanos_per_mtok",
}


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


@dataclass(frozen=True, slots=True)
class ChargeSum:
    """Sums charges of one kind and subject under one price version: trained tokens, or hours."""

    kind: str
    subject: str
    price: PriceVersion
    quantity: int
    amount_nanos: int
    late: str | None = None


def usage_lines(sums: Sequence[MonthUsage], included: Included) -> list[InvoiceLine]:
    """Return one line per sum: the month's own before late ones, then by model, price version and tier.

    Included tokens are used first where tokens are dearest, and on late usage last.
    """
    ordered = sorted(sums, key=lambda s: (s.late or "", s.model, s.price.id, s.tier == "batch", s.adapter))
    included_tokens = _included_tokens(ordered, included)
    return [
        _line(month_usage, {name: included_tokens[name][i] for name in CLASSES})
        for i, month_usage in enumerate(ordered)
    ]


def charge_lines(sums: Sequence[ChargeSum]) -> list[InvoiceLine]:
    """Return one line per sum. Charges are flat and were rounded one by one."""
    lines = []
    for charge_sum in sorted(sums, key=lambda s: (s.late or "", s.kind, s.subject, s.price.id)):
        plan = charge_sum.price.plan
        if charge_sum.kind == "training":
            item = LineItem(
                what="trained tokens",
                quantity=charge_sum.quantity,
                nanos=plan.training_nanos_per_mtok,
                per=MTOK,
            )
        else:
            item = LineItem(
                what="adapter-hours", quantity=charge_sum.quantity, nanos=plan.adapter_hour_nanos, per=1
            )
        lines.append(
            InvoiceLine.model_validate(
                {
                    "kind": charge_sum.kind,
                    "model": charge_sum.subject,
                    "price": charge_sum.price.label,
                    "plan_id": charge_sum.price.id,
                    "adapter": True,
                    "items": (item,),
                    "list_nanos": charge_sum.amount_nanos,
                    "amount_nanos": charge_sum.amount_nanos,
                    "late": charge_sum.late,
                }
            )
        )
    return lines


def minimum_lines(lines: Sequence[InvoiceLine], price: PriceVersion | None) -> list[InvoiceLine]:
    """Return a line for the shortfall to the plan's monthly minimum, if there is one."""
    missing = price.plan.minimum_nanos - sum(line.amount_nanos for line in lines) if price else 0
    if price is None or missing <= 0:
        return []
    minimum = labelled(price.plan.minimum_nanos, price.plan.currency)
    item = LineItem(what=f"rest of the monthly minimum of {minimum}", quantity=1, nanos=missing, per=1)
    return [
        InvoiceLine(
            kind="minimum",
            model="Minimum commitment, less the above",
            price=price.label,
            plan_id=price.id,
            items=(item,),
            list_nanos=0,
            amount_nanos=missing,
        )
    ]


def _included_tokens(sums: Sequence[MonthUsage], included: Included) -> Mapping[str, list[int]]:
    """Return, per token class, the number of included tokens of each sum."""
    quotas = (included.prompt_tokens, included.cached_prompt_tokens, included.completion_tokens)
    shares: dict[str, list[int]] = {}
    for (name, field), quota in zip(CLASSES.items(), quotas, strict=True):
        shares[name] = [0] * len(sums)
        if quota:
            negated_prices = [-list_price(getattr(_month_rates(month_usage), field)) for month_usage in sums]
            for i in sorted(range(len(sums)), key=lambda i: (sums[i].late or "", negated_prices[i], i)):
                shares[name][i] = min(quota, _counts(sums[i])[name])
                quota -= shares[name][i]
    return shares


def _line(month_usage: MonthUsage, included_tokens: Mapping[str, int]) -> InvoiceLine:
    priced, counts = _month_rates(month_usage), _counts(month_usage)
    items, micronanos = [], 0
    for name, field in CLASSES.items():
        components = price_components(getattr(priced, field), counts[name] - included_tokens[name])
        micronanos += sum(component.micronanos for component in components)
        items += [
            _item(name, component, included_tokens[name] if first else 0)
            for first, component in _first(components)
        ]
    if month_usage.cold_loads and priced.cold_load_nanos:
        items.append(
            LineItem(what="cold loads", quantity=month_usage.cold_loads, nanos=priced.cold_load_nanos, per=1)
        )
        micronanos += month_usage.cold_loads * priced.cold_load_nanos * MTOK
    as_charged = isinstance(priced, Rates) and not any(included_tokens.values())
    return InvoiceLine(
        model=month_usage.model,
        price=month_usage.price.label,
        plan_id=month_usage.price.id,
        adapter=month_usage.adapter,
        tier=month_usage.tier,
        requests=month_usage.requests,
        items=tuple(items),
        list_nanos=month_usage.list_nanos,
        amount_nanos=month_usage.list_nanos if as_charged else (micronanos + MTOK // 2) // MTOK,
        late=month_usage.late,
    )


def _first(components: Sequence[PriceComponent]) -> list[tuple[bool, PriceComponent]]:
    return [(position == 0, component) for position, component in enumerate(components)]


def _item(name: str, component: PriceComponent, included: int) -> LineItem:
    what = f"{name}, {component.note}" if component.note else name
    return LineItem(
        what=what, quantity=component.quantity, nanos=component.nanos, per=component.per, included=included
    )


def _month_rates(month_usage: MonthUsage) -> Rates | TieredRates:
    return month_usage.price.plan.month_rates(
        model=month_usage.model, adapter=month_usage.adapter, batch=month_usage.tier == "batch"
    )


def _counts(month_usage: MonthUsage) -> Mapping[str, int]:
    return {
        PROMPT: month_usage.tokens.uncached,
        CACHED: month_usage.tokens.cached,
        COMPLETION: month_usage.tokens.completion,
    }
