"""A month's document, computed: from the hours' sums and the charges, never from single events.

The same store gives the same document, to the nano. `as_of` asks for what it was when something was
issued: credits that later invoices applied do not count then.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.credits.grants import Applied, Grant, Spend, grants_of, left_nanos, replay
from serve.billing.invoicing.billing_details import SELLER, party_of
from serve.billing.invoicing.document import CreditApplied, InvoiceDocument, TaxApplied
from serve.billing.invoicing.periods import period_bounds
from serve.billing.invoicing.store import live_finals
from serve.billing.metering.rollups import hours_table
from serve.billing.pricing.plans import Included, Prices, PriceVersion, Tokens
from serve.billing.pricing.rating import ChargeSum, MonthUsage, charge_lines, minimum_lines, usage_lines
from serve.storage.database import Store

Finals = Mapping[str, InvoiceDocument]


def statement(
    store: Store, connection: sa.Connection, tenant: str, period: str, *, as_of: datetime | None = None
) -> InvoiceDocument:
    """What `tenant` owes for the month. Raises OperatorError for a malformed period."""
    start, end = period_bounds(period)
    prices = Prices(store)
    versions = prices.by_id(connection)
    terms = prices.at(connection, tenant, end - timedelta(microseconds=1))
    included = terms.plan.included if terms else Included()
    lines = usage_lines(_sums(connection, tenant, period, start, versions), included)
    lines += charge_lines(_charges(connection, tenant, period, start, versions))
    lines += minimum_lines(lines, terms)
    subtotal = sum(line.amount_nanos for line in lines)
    finals = {of: doc for of, doc in live_finals(connection, tenant, as_of=as_of).items() if of != period}
    spends = open_spends(connection, tenant, finals, until=period)
    last_day = (end - timedelta(days=1)).date()
    own = _fit([spend for spend in spends if spend.period == period], subtotal, Spend(last_day, period, 0))
    earlier = [spend for spend in spends if spend.period != period]
    grants = grants_of(connection, tenant)
    before = applied_by(finals)
    paid = replay(grants, [*earlier, *own], before)
    promoted = _of_kind(grants, paid, period, "promotional")
    taxable = subtotal - sum(promoted.values())
    tax = _tax(terms, taxable)
    prepaid = _of_kind(grants, paid, period, "prepaid")
    if tax is not None:  # prepaid money pays it, too; a promotion lowered it
        on_tax = replay(
            [grant for grant in grants if grant.kind == "prepaid"],
            [Spend(last_day, period, tax.amount_nanos)],
            _together(before, paid),
        )
        for (grant, _), nanos in on_tax.items():
            prepaid[grant] = prepaid.get(grant, 0) + nanos
    applied = [("promotional", promoted), ("prepaid", prepaid)]
    return InvoiceDocument(
        tenant=tenant,
        period=period,
        currency=_currency(terms, lines[0].plan_id if lines else None, versions),
        plan=terms.label if terms else None,
        seller=party_of(connection, SELLER),
        buyer=party_of(connection, tenant),
        lines=tuple(lines),
        credits=tuple(
            CreditApplied.model_validate({"grant": grant, "kind": kind, "amount_nanos": nanos})
            for kind, amounts in applied
            for grant, nanos in sorted(amounts.items())
        ),
        tax=tax,
    )


def open_spends(
    connection: sa.Connection, tenant: str, finals: Iterable[str], *, until: str = "9999-99"
) -> list[Spend]:
    """The days' spending, at list price, of the months up to `until` whose invoice is not final."""
    h, c, closed = hours_table.c, charges_table.c, set(finals)
    days: dict[tuple[date, str], int] = defaultdict(int)
    hours = sa.select(h.hour, h.period, sa.func.sum(h.cost_nanos).label("nanos"))
    hours = hours.where(h.tenant_id == tenant, h.period.not_in(closed), h.period <= until)
    for row in connection.execute(hours.group_by(h.hour, h.period)):
        days[row.hour.date(), row.period] += int(row.nanos)
    made = sa.select(c.created_at, c.period, c.amount_nanos)
    made = made.where(c.tenant_id == tenant, c.period.not_in(closed), c.period <= until)
    for row in connection.execute(made):
        days[row.created_at.date(), row.period] += row.amount_nanos
    return [Spend(day, period, nanos) for (day, period), nanos in sorted(days.items())]


def applied_by(finals: Finals) -> Applied:
    """What invoices that are final have applied of the grants."""
    applied: dict[tuple[str, str], int] = defaultdict(int)
    for period, document in finals.items():
        for credit in document.credits:
            applied[credit.grant, period] += credit.amount_nanos
    return applied


def credit_left(connection: sa.Connection, tenant: str) -> dict[str, int]:
    """By grant, what invoices have not applied and what was spent since does not use."""
    grants, finals = grants_of(connection, tenant), live_finals(connection, tenant)
    before = applied_by(finals)
    since = replay(grants, open_spends(connection, tenant, finals), before)
    return left_nanos(grants, [before, since])


def _sums(
    connection: sa.Connection, tenant: str, period: str, start: datetime, versions: Mapping[int, PriceVersion]
) -> list[MonthUsage]:
    h = hours_table.c
    keys = (h.model, h.adapter, h.plan_id, h.tier)
    names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cold_loads", "cost_nanos")
    query = sa.select(*keys, *(sa.func.sum(h[name]).label(name) for name in names))
    query = query.where(h.tenant_id == tenant, h.period == period)
    own = connection.execute(query.where(h.hour >= start).group_by(*keys)).all()
    late = connection.execute(query.add_columns(h.hour).where(h.hour < start).group_by(*keys, h.hour)).all()
    sums: dict[tuple[str, bool, int, str, str | None], list[int]] = defaultdict(lambda: [0] * len(names))
    for rows, is_late in ((own, False), (late, True)):
        for row in rows:
            key = (row.model, bool(row.adapter), row.plan_id, row.tier)
            counts = sums[(*key, f"{row.hour:%Y-%m}" if is_late else None)]
            for position, name in enumerate(names):
                counts[position] += int(getattr(row, name))
    made = []
    for (model, adapter, plan_id, tier, month), counts in sums.items():
        requests, prompt, cached, completion, cold_loads, list_nanos = counts
        made.append(
            MonthUsage(
                model=model,
                adapter=adapter,
                tier=tier,
                price=versions[plan_id],
                requests=requests,
                tokens=Tokens(prompt, cached, completion),
                cold_loads=cold_loads,
                list_nanos=list_nanos,
                late=month,
            )
        )
    return made


def _charges(
    connection: sa.Connection, tenant: str, period: str, start: datetime, versions: Mapping[int, PriceVersion]
) -> list[ChargeSum]:
    c = charges_table.c
    sums: dict[tuple[str, str, int, str | None], tuple[int, int]] = {}
    for row in connection.execute(sa.select(charges_table).where(c.tenant_id == tenant, c.period == period)):
        late = f"{row.created_at:%Y-%m}" if row.created_at < start else None
        key = (row.kind, row.subject, row.plan_id, late)
        quantity, nanos = sums.get(key, (0, 0))
        sums[key] = (quantity + row.quantity, nanos + row.amount_nanos)
    return [
        ChargeSum(kind, subject, versions[plan_id], quantity, nanos, late)
        for (kind, subject, plan_id, late), (quantity, nanos) in sums.items()
    ]


def _fit(spends: Sequence[Spend], total_nanos: int, last: Spend) -> list[Spend]:
    """The days' spending such that it adds up to what is billed: cut off, or the rest on the last day."""
    fitted, left = [], total_nanos
    for spend in spends:
        fitted.append(Spend(spend.day, spend.period, min(spend.nanos, left)))
        left -= fitted[-1].nanos
    return [*fitted, Spend(last.day, last.period, left)]


def _of_kind(grants: Sequence[Grant], applied: Applied, period: str, kind: str) -> dict[str, int]:
    return {
        grant.id: applied[grant.id, period]
        for grant in grants
        if grant.kind == kind and applied.get((grant.id, period))
    }


def _together(*several: Applied) -> Applied:
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for applied in several:
        for key, nanos in applied.items():
            sums[key] += nanos
    return sums


def _tax(terms: PriceVersion | None, taxable_nanos: int) -> TaxApplied | None:
    if terms is None or terms.plan.tax is None:
        return None
    tax = terms.plan.tax
    return TaxApplied(
        name=tax.name,
        percent=tax.percent,
        taxable_nanos=taxable_nanos,
        amount_nanos=tax.nanos(taxable_nanos),
    )


def _currency(terms: PriceVersion | None, plan_id: int | None, versions: Mapping[int, PriceVersion]) -> str:
    used = terms or (versions[plan_id] if plan_id is not None else None)
    return used.plan.currency if used else "USD"
