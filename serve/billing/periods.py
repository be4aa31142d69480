"""Billing periods: the month whose invoice a usage event is on.

An event belongs to the month (UTC) in which it was settled, unless that month's invoice is final already:
then to the next month that is open, and that invoice says so. The decision is made in the settlement's own
transaction, which holds the tenant's account: finalizing an invoice takes the same lock.
"""

from collections.abc import Sequence
from datetime import datetime

import sqlalchemy as sa

from serve.db import UtcDateTime, metadata

periods_table = sa.Table(
    "closed_periods",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("period", sa.String(7), primary_key=True),
    sa.Column("closed_at", UtcDateTime, nullable=False),
)


_CLOSED = sa.select(periods_table.c.tenant_id, periods_table.c.period).where(
    periods_table.c.tenant_id.in_(sa.bindparam("tenants", expanding=True))
)


def open_periods(connection: sa.Connection, events: Sequence[tuple[str, datetime]]) -> list[str]:
    """The billing period of each (tenant, time)."""
    if not events:
        return []
    tenants = sorted({tenant for tenant, _ in events})
    closed = {(row.tenant_id, row.period) for row in connection.execute(_CLOSED, {"tenants": tenants})}
    periods = []
    for tenant, at in events:
        period = f"{at:%Y-%m}"
        while (tenant, period) in closed:
            period = following(period)
        periods.append(period)
    return periods


def following(period: str) -> str:
    """The month after `period` ("2026-12" → "2027-01")."""
    year, month = int(period[:4]), int(period[5:])
    return f"{year + month // 12:04d}-{month % 12 + 1:02d}"
