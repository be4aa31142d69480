"""Billing periods assign each usage event and charge to the month whose invoice bills it.

A period is a month in UTC: "2026-11" is [1 November, 1 December). An event belongs to the month in which it
was settled. If that month is closed, because its invoice is final, the event belongs to the next open month,
whose invoice shows it as late usage. The settlement's own transaction decides this while it locks the
tenant's account; finalizing an invoice takes the same lock.
"""

import calendar
import re
from collections.abc import Sequence
from datetime import UTC, datetime

import sqlalchemy as sa

from serve.errors import OperatorError
from serve.storage.database import UtcDateTime, metadata


def period_bounds(period: str) -> tuple[datetime, datetime]:
    """Return [start, end) of the month "YYYY-MM" in UTC. Raises OperatorError if it is not a month."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", period) or period.startswith("0000"):
        raise OperatorError(f"'{period}' is not a month; write it as 2026-11.")
    year, month = int(period[:4]), int(period[5:])
    if (year, month) == (9999, 12):
        raise OperatorError(f"'{period}' is too far away.")
    start = datetime(year, month, 1, tzinfo=UTC)
    next_month = (year + 1, 1) if month == 12 else (year, month + 1)
    return start, datetime(*next_month, 1, tzinfo=UTC)


def period_name(period: str) -> str:
    start, _ = period_bounds(period)
    return f"{calendar.month_name[start.month]} {start.year}"


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
    """Return the billing period of each (tenant, time)."""
    if not events:
        return []
    tenants = sorted({tenant for tenant, _ in events})
    closed = {(row.tenant_id, row.period) for row in connection.execute(_CLOSED, {"tenants": tenants})}
    periods = []
    for tenant, at in events:
        period = f"{at:%Y-%m}"
        while (tenant, period) in closed:
            period = next_period(period)
        periods.append(period)
    return periods


def next_period(period: str) -> str:
    """Return the month after `period` ("2026-12" → "2027-01")."""
    year, month = int(period[:4]), int(period[5:])
    return f"{year + month // 12:04d}-{month % 12 + 1:02d}"
