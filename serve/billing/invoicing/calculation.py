"""Calculates a month's invoice document from the hourly sums and the charges.

The same store gives the same document, to the nano. Single events are never read. `as_of` calculates the
document as it was at an earlier time: credits that later invoices applied do not count then.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.credits.grants import Applied, Grant, Spend, grants_of, remaining_nanos, replay
from serve.billing.invoicing.billing_details import SELLER, party_of
from serve.billing.invoicing.document import CreditApplied, InvoiceDocument, PlanDays, TaxApplied
from serve.billing.invoicing.periods import period_bounds
from serve.billing.invoicing.store import final_documents
from serve.billing.invoicing.sums import MonthSums
from serve.billing.metering.rollups import hours_table
from serve.billing.money import DEFAULT_CURRENCY
from serve.billing.pricing.plans import Included, Prices, PriceVersion
from serve.billing.pricing.proration import MonthTerms, month_terms
from serve.billing.pricing.rating import charge_lines, minimum_lines, usage_lines
from serve.storage.database import Store

Finals = Mapping[str, InvoiceDocument]


def calculate_invoice(
    store: Store, connection: sa.Connection, tenant: str, period: str, *, as_of: datetime | None = None
) -> InvoiceDocument:
    """Calculate what `tenant` owes for the month. Raises OperatorError for a malformed period."""
    start, end = period_bounds(period)
    versions = Prices(store).by_id(connection)
    sums = MonthSums(versions, connection, tenant)
    terms = month_terms(versions, connection, tenant, start, end)
    price, usage = terms.price, sums.usage(period)
    lines = usage_lines(usage, terms.included, sums.billed_before(usage, period))
    lines += charge_lines(sums.charges(period))
    lines += minimum_lines(lines, terms)
    subtotal = sum(line.amount_nanos for line in lines)
    other_finals = {
        month: document
        for month, document in final_documents(connection, tenant, as_of=as_of).items()
        if month != period
    }
    spends = open_spends(connection, tenant, other_finals, until=period)
    last_day = (end - timedelta(days=1)).date()
    own_spends = _fit_to_total(
        [spend for spend in spends if spend.period == period], subtotal, Spend(last_day, period, 0)
    )
    earlier_spends = [spend for spend in spends if spend.period != period]
    grants = grants_of(connection, tenant)
    applied_before = applied_credits(other_finals)
    applied_now = replay(grants, [*earlier_spends, *own_spends], applied_before)
    promotional = _applied_by_kind(grants, applied_now, period, "promotional")
    taxable = subtotal - sum(promotional.values())
    tax = _tax(price, taxable)
    prepaid = _applied_by_kind(grants, applied_now, period, "prepaid")
    if tax is not None:  # prepaid credit also pays the tax; promotional credit has lowered it
        applied_to_tax = replay(
            [grant for grant in grants if grant.kind == "prepaid"],
            [Spend(last_day, period, tax.amount_nanos)],
            _add_credits(applied_before, applied_now),
        )
        for (grant, _), nanos in applied_to_tax.items():
            prepaid[grant] = prepaid.get(grant, 0) + nanos
    credits_by_kind = [("promotional", promotional), ("prepaid", prepaid)]
    return InvoiceDocument(
        tenant=tenant,
        period=period,
        currency=_currency(price, lines[0].plan_id if lines else None, versions),
        plan=price.label if price else None,
        seller=party_of(connection, SELLER),
        buyer=party_of(connection, tenant),
        proration=terms.proration,
        plan_days=_plan_days(terms),
        lines=tuple(lines),
        credits=tuple(
            CreditApplied.model_validate({"grant": grant, "kind": kind, "amount_nanos": nanos})
            for kind, amounts in credits_by_kind
            for grant, nanos in sorted(amounts.items())
        ),
        tax=tax,
    )


def open_spends(
    connection: sa.Connection, tenant: str, finals: Iterable[str], *, until: str = "9999-99"
) -> list[Spend]:
    """Return the days' spending at list price of the months up to `until` that have no final invoice."""
    h, c, final_periods = hours_table.c, charges_table.c, set(finals)
    days: dict[tuple[date, str], int] = defaultdict(int)
    hours = sa.select(h.hour, h.period, sa.func.sum(h.cost_nanos).label("nanos"))
    hours = hours.where(h.tenant_id == tenant, h.period.not_in(final_periods), h.period <= until)
    for row in connection.execute(hours.group_by(h.hour, h.period)):
        days[row.hour.date(), row.period] += int(row.nanos)
    charges = sa.select(c.created_at, c.period, c.amount_nanos)
    charges = charges.where(c.tenant_id == tenant, c.period.not_in(final_periods), c.period <= until)
    for row in connection.execute(charges):
        days[row.created_at.date(), row.period] += row.amount_nanos
    return [Spend(day, period, nanos) for (day, period), nanos in sorted(days.items())]


def applied_credits(finals: Finals) -> Applied:
    """Return what final invoices have applied of each grant."""
    applied: dict[tuple[str, str], int] = defaultdict(int)
    for period, document in finals.items():
        for credit in document.credits:
            applied[credit.grant, period] += credit.amount_nanos
    return applied


def remaining_credit(connection: sa.Connection, tenant: str) -> dict[str, int]:
    """Return, by grant, what neither final invoices nor later spending has used."""
    grants, finals = grants_of(connection, tenant), final_documents(connection, tenant)
    applied = applied_credits(finals)
    pending = replay(grants, open_spends(connection, tenant, finals), applied)
    return remaining_nanos(grants, [applied, pending])


def _plan_days(terms: MonthTerms) -> tuple[PlanDays, ...]:
    if terms.minimum_nanos == 0 and terms.included == Included():
        return ()
    return tuple(
        PlanDays(
            price=share.price.label,
            days=share.days,
            days_of_month=terms.days_of_month,
            minimum_nanos=share.minimum_nanos,
            included=share.included,
        )
        for share in terms.shares
    )


def _fit_to_total(spends: Sequence[Spend], total_nanos: int, last: Spend) -> list[Spend]:
    """Fit the days' spending to what is billed: cut it off, or add the rest to the last day."""
    fitted_spends, remaining_nanos = [], total_nanos
    for spend in spends:
        fitted_spends.append(Spend(spend.day, spend.period, min(spend.nanos, remaining_nanos)))
        remaining_nanos -= fitted_spends[-1].nanos
    return [*fitted_spends, Spend(last.day, last.period, remaining_nanos)]


def _applied_by_kind(grants: Sequence[Grant], applied: Applied, period: str, kind: str) -> dict[str, int]:
    return {
        grant.id: applied[grant.id, period]
        for grant in grants
        if grant.kind == kind and applied.get((grant.id, period))
    }


def _add_credits(*credit_maps: Applied) -> Applied:
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for applied in credit_maps:
        for key, nanos in applied.items():
            sums[key] += nanos
    return sums


def _tax(price: PriceVersion | None, taxable_nanos: int) -> TaxApplied | None:
    if price is None or price.plan.tax is None:
        return None
    tax = price.plan.tax
    return TaxApplied(
        name=tax.name,
        percent=tax.percent,
        taxable_nanos=taxable_nanos,
        amount_nanos=tax.nanos(taxable_nanos),
    )


def _currency(price: PriceVersion | None, plan_id: int | None, versions: Mapping[int, PriceVersion]) -> str:
    price_version = price or (versions[plan_id] if plan_id is not None else None)
    return price_version.plan.currency if price_version else DEFAULT_CURRENCY
