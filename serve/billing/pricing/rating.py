"""Rates a month's sums: computes invoice lines from usage and charges.

Rating is pure and uses integers: the same sums always give the same lines. A line is rounded once, half up
to the nano. If every price is flat and no tokens are included, the line is the sum of the events' own costs,
each rounded when it was charged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.billing.invoicing.document import InvoiceLine, LineItem, TierCount
from serve.billing.money import labelled
from serve.billing.pricing.counting import (
    CLASSES,
    ClassCounts,
    CountedTogether,
    MonthUsage,
    Position,
    included_tokens,
    positions,
)
from serve.billing.pricing.plans import Included, PriceVersion, Rates
from serve.billing.pricing.proration import MonthTerms
from serve.billing.pricing.tiers import MTOK, PriceComponent, price_components


@dataclass(frozen=True, slots=True)
class ChargeSum:
    """Sums charges of one kind and subject under one price version: trained tokens, or hours."""

    kind: str
    subject: str
    price: PriceVersion
    quantity: int
    amount_nanos: int
    late: str | None = None


def usage_lines(
    sums: Sequence[MonthUsage], included: Included, earlier: Mapping[CountedTogether, int] | None = None
) -> list[InvoiceLine]:
    """Return one line per sum: the month's own before late ones, then by model, price version and tier.

    `earlier` counts what earlier invoices billed of the months of late usage (`counting.billed_tokens`).
    """
    ordered = sorted(sums, key=lambda s: (s.late or "", s.model, s.price.id, s.tier == "batch", s.adapter))
    free = included_tokens(ordered, included)
    placed = positions(ordered, free, earlier or {})
    return [
        _line(month_usage, free_tokens, places)
        for month_usage, free_tokens, places in zip(ordered, free, placed, strict=True)
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


def minimum_lines(lines: Sequence[InvoiceLine], terms: MonthTerms) -> list[InvoiceLine]:
    """Return a line for the shortfall to the month's minimum, if there is one."""
    price, missing = terms.price, terms.minimum_nanos - sum(line.amount_nanos for line in lines)
    if price is None or terms.minimum_nanos == 0 or missing <= 0:
        return []
    minimum = labelled(terms.minimum_nanos, price.plan.currency)
    whole = f"the monthly minimum of {minimum}"
    prorated = f"the minimum of {minimum}, prorated by day"
    item = LineItem(
        what=f"rest of {prorated if terms.proration == 'day' else whole}", quantity=1, nanos=missing, per=1
    )
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


def _line(month_usage: MonthUsage, free_tokens: ClassCounts, places: Mapping[str, Position]) -> InvoiceLine:
    priced, plan = month_usage.month_rates, month_usage.price.plan
    items, micronanos = [], 0
    for name, field in CLASSES.items():
        price, place, free = getattr(priced, field), places[name], free_tokens[name]
        billed = month_usage.counts[name] - free
        components = price_components(price, billed, before=place.before, total=place.total)
        micronanos += sum(component.micronanos for component in components)
        count = (
            None
            if isinstance(price, int)
            else TierCount(before=place.before, tokens=billed, total=place.total)
        )
        items += [
            _item(name, component, free if position == 0 else 0, count)
            for position, component in enumerate(components)
        ]
    if month_usage.cold_loads and priced.cold_load_nanos:
        items.append(
            LineItem(what="cold loads", quantity=month_usage.cold_loads, nanos=priced.cold_load_nanos, per=1)
        )
        micronanos += month_usage.cold_loads * priced.cold_load_nanos * MTOK
    as_charged = isinstance(priced, Rates) and not any(free_tokens.values())
    return InvoiceLine(
        model=month_usage.model,
        price=month_usage.price.label,
        plan_id=month_usage.price.id,
        adapter=month_usage.adapter,
        tier=month_usage.tier,
        tiers_over=plan.tiers_over if any(item.counted for item in items) else None,
        requests=month_usage.requests,
        items=tuple(items),
        list_nanos=month_usage.list_nanos,
        amount_nanos=month_usage.list_nanos if as_charged else (micronanos + MTOK // 2) // MTOK,
        late=month_usage.late,
    )


def _item(name: str, component: PriceComponent, included: int, count: TierCount | None) -> LineItem:
    return LineItem(
        what=f"{name}, {component.note}" if component.note else name,
        quantity=component.quantity,
        nanos=component.nanos,
        per=component.per,
        included=included,
        counted=count,
    )
