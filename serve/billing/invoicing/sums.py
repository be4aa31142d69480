"""Reads what a month's invoice bills: sums of usage from the hours, and sums of charges."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.invoicing.periods import period_bounds
from serve.billing.metering.rollups import SUMS, hours_table
from serve.billing.pricing.counting import CountedTogether, MonthUsage, billed_tokens
from serve.billing.pricing.plans import PriceVersion, Tokens
from serve.billing.pricing.proration import month_terms
from serve.billing.pricing.rating import ChargeSum


class MonthSums:
    """Reads the sums of one tenant's months on one connection."""

    def __init__(self, versions: Mapping[int, PriceVersion], connection: sa.Connection, tenant: str) -> None:
        self._versions, self._connection, self._tenant = versions, connection, tenant

    def usage(self, period: str) -> list[MonthUsage]:
        """Return the usage that the invoice of `period` bills, late usage by its month of use."""
        h, (start, _) = hours_table.c, period_bounds(period)
        keys = (h.model, h.adapter, h.plan_id, h.tier)
        query = sa.select(*keys, *(sa.func.sum(h[name]).label(name) for name in SUMS))
        query = query.where(h.tenant_id == self._tenant, h.period == period)
        own_rows = self._connection.execute(query.where(h.hour >= start).group_by(*keys)).all()
        late_rows = self._connection.execute(
            query.add_columns(h.hour).where(h.hour < start).group_by(*keys, h.hour)
        ).all()
        sums: dict[tuple[str, bool, int, str, str | None], list[int]] = defaultdict(lambda: [0] * len(SUMS))
        for rows, is_late in ((own_rows, False), (late_rows, True)):
            for row in rows:
                key = (row.model, bool(row.adapter), row.plan_id, row.tier)
                counts = sums[(*key, f"{row.hour:%Y-%m}" if is_late else None)]
                for position, name in enumerate(SUMS):
                    counts[position] += int(getattr(row, name))
        usages = []
        for (model, adapter, plan_id, tier, late_month), counts in sums.items():
            requests, prompt, cached, completion, cold_loads, list_nanos = counts
            usages.append(
                MonthUsage(
                    model=model,
                    adapter=adapter,
                    tier=tier,
                    price=self._versions[plan_id],
                    requests=requests,
                    tokens=Tokens(prompt, cached, completion),
                    cold_loads=cold_loads,
                    list_nanos=list_nanos,
                    late=late_month,
                )
            )
        return usages

    def billed_before(self, usage: Sequence[MonthUsage], period: str) -> Counter[CountedTogether]:
        """Count what invoices before `period` billed of the months of late usage in `usage`.

        A closed month's sums no longer change, so this count is the same whenever it is made.
        """
        h, counted = hours_table.c, Counter[CountedTogether]()
        late_months = sorted({month_usage.late for month_usage in usage if month_usage.late})
        periods: set[str] = set()
        for month in late_months:
            start, end = period_bounds(month)
            query = sa.select(h.period).where(h.tenant_id == self._tenant, h.hour >= start, h.hour < end)
            periods |= set(self._connection.execute(query.where(h.period < period).distinct()).scalars())
        for earlier_period in sorted(periods):
            terms = month_terms(
                self._versions, self._connection, self._tenant, *period_bounds(earlier_period)
            )
            earlier_usage = self.usage(earlier_period)
            counted.update(billed_tokens(earlier_usage, terms.included, earlier_period))
        return counted

    def charges(self, period: str) -> list[ChargeSum]:
        """Return the charges that the invoice of `period` bills."""
        c, (start, _) = charges_table.c, period_bounds(period)
        query = sa.select(charges_table).where(c.tenant_id == self._tenant, c.period == period)
        sums: dict[tuple[str, str, int, str | None], tuple[int, int]] = {}
        for row in self._connection.execute(query):
            late = f"{row.created_at:%Y-%m}" if row.created_at < start else None
            key = (row.kind, row.subject, row.plan_id, late)
            quantity, nanos = sums.get(key, (0, 0))
            sums[key] = (quantity + row.quantity, nanos + row.amount_nanos)
        return [
            ChargeSum(kind, subject, self._versions[plan_id], quantity, nanos, late)
            for (kind, subject, plan_id, late), (quantity, nanos) in sums.items()
        ]
