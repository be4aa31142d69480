"""Rating: what a month's sums cost. Pure, and in integers: the same sums are the same lines, for ever.

A line is rounded once, half up to the nano. Where every price is flat and nothing is included, the events'
own costs add up to the line: they were rounded one by one when they were charged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from serve.billing.invoicing.document import InvoiceLine, LineItem
from serve.billing.pricing.plans import Included, PriceVersion, Rates, TieredRates, Tokens
from serve.billing.pricing.tiers import MTOK, PriceComponent, list_price, parts

PROMPT, CACHED, COMPLETION = "prompt tokens", "prompt tokens, cached", "completion tokens"
CLASSES = {
    PROMPT: "prompt_nanos_per_mtok",
    CACHED: "cached_prompt_nanos_per_mtok",
    COMPLETION: "completion_nanos_per_mtok",
}


@dataclass(frozen=True, slots=True)
class MonthUsage:
    """A month's usage of one model and tier under one price version; `late` as in `InvoiceLine`."""

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
    """Charges of one kind and subject under one price version: trained tokens, or hours."""

    kind: str
    subject: str
    price: PriceVersion
    quantity: int
    amount_nanos: int
    late: str | None = None


def usage_lines(sums: Sequence[MonthUsage], included: Included) -> list[InvoiceLine]:
    """One line per sum, the month's own before late ones, then by model, price version and tier.

    Included tokens are spent where they are dearest, on late usage last.
    """
    ordered = sorted(sums, key=lambda s: (s.late or "", s.model, s.price.id, s.tier == "batch", s.adapter))
    free = _share(ordered, included)
    return [_line(one, {name: free[name][i] for name in CLASSES}) for i, one in enumerate(ordered)]


def charge_lines(sums: Sequence[ChargeSum]) -> list[InvoiceLine]:
    """One line per sum. Charges are flat, and were rounded one by one."""
    made = []
    for one in sorted(sums, key=lambda s: (s.late or "", s.kind, s.subject, s.price.id)):
        plan = one.price.plan
        if one.kind == "training":
            item = LineItem(
                what="trained tokens", quantity=one.quantity, nanos=plan.training_nanos_per_mtok, per=MTOK
            )
        else:
            item = LineItem(what="adapter-hours", quantity=one.quantity, nanos=plan.adapter_hour_nanos, per=1)
        made.append(
            InvoiceLine.model_validate(
                {
                    "kind": one.kind,
                    "model": one.subject,
                    "price": one.price.label,
                    "plan_id": one.price.id,
                    "adapter": True,
                    "items": (item,),
                    "list_nanos": one.amount_nanos,
                    "amount_nanos": one.amount_nanos,
                    "late": one.late,
                }
            )
        )
    return made


def minimum_lines(lines: Sequence[InvoiceLine], price: PriceVersion | None) -> list[InvoiceLine]:
    """What is missing to the plan's monthly minimum, if anything."""
    missing = price.plan.minimum_nanos - sum(line.amount_nanos for line in lines) if price else 0
    if price is None or missing <= 0:
        return []
    item = LineItem(what="monthly minimum", quantity=1, nanos=price.plan.minimum_nanos, per=1)
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


def _share(sums: Sequence[MonthUsage], included: Included) -> Mapping[str, list[int]]:
    """Per class, how many tokens of each sum are included."""
    quotas = (included.prompt_tokens, included.cached_prompt_tokens, included.completion_tokens)
    shares: dict[str, list[int]] = {}
    for (name, field), quota in zip(CLASSES.items(), quotas, strict=True):
        shares[name] = [0] * len(sums)
        if quota:
            dearest = [-list_price(getattr(_priced(one), field)) for one in sums]
            for i in sorted(range(len(sums)), key=lambda i: (sums[i].late or "", dearest[i], i)):
                shares[name][i] = min(quota, _counts(sums[i])[name])
                quota -= shares[name][i]
    return shares


def _line(one: MonthUsage, free: Mapping[str, int]) -> InvoiceLine:
    priced, counts = _priced(one), _counts(one)
    items, micronanos = [], 0
    for name, field in CLASSES.items():
        sold = parts(getattr(priced, field), counts[name] - free[name])
        micronanos += sum(part.micronanos for part in sold)
        items += [_item(name, part, free[name] if first else 0) for first, part in _first(sold)]
    if one.cold_loads and priced.cold_load_nanos:
        items.append(
            LineItem(what="cold loads", quantity=one.cold_loads, nanos=priced.cold_load_nanos, per=1)
        )
        micronanos += one.cold_loads * priced.cold_load_nanos * MTOK
    as_charged = isinstance(priced, Rates) and not any(free.values())
    return InvoiceLine(
        model=one.model,
        price=one.price.label,
        plan_id=one.price.id,
        adapter=one.adapter,
        tier=one.tier,
        requests=one.requests,
        items=tuple(items),
        list_nanos=one.list_nanos,
        amount_nanos=one.list_nanos if as_charged else (micronanos + MTOK // 2) // MTOK,
        late=one.late,
    )


def _first(sold: Sequence[PriceComponent]) -> list[tuple[bool, PriceComponent]]:
    return [(position == 0, part) for position, part in enumerate(sold)]


def _item(name: str, part: PriceComponent, included: int) -> LineItem:
    what = f"{name}, {part.note}" if part.note else name
    return LineItem(what=what, quantity=part.quantity, nanos=part.nanos, per=part.per, included=included)


def _priced(one: MonthUsage) -> Rates | TieredRates:
    return one.price.plan.priced(model=one.model, adapter=one.adapter, batch=one.tier == "batch")


def _counts(one: MonthUsage) -> Mapping[str, int]:
    return {PROMPT: one.tokens.uncached, CACHED: one.tokens.cached, COMPLETION: one.tokens.completion}
