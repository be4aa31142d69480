"""Bills adapter hours: each hour in which an adapter version was ready is billed once.

Only hours that are over are billed. The steward calls this every hour and catches up on missed hours, up to
HOURS_MAX back.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import adapter_hour, charges_table, post_charge, residency_reference
from serve.billing.pricing.plans import Prices
from serve.registry.versions import VersionState, adapters_table
from serve.storage.database import Store

HOURS_MAX = 72
HOUR = timedelta(hours=1)


def charge_residency(store: Store, at: datetime) -> int:
    """Bill the adapter hours before `at` that are not billed yet. Return their number.

    Hours in which the tenant's plan has no price for adapter hours are not billed.
    """
    end = at.replace(minute=0, second=0, microsecond=0)
    start = end - HOURS_MAX * HOUR
    c, count = adapters_table.c, 0
    ready = sa.select(adapters_table).where(
        c.state == VersionState.READY, sa.or_(c.retired_at.is_(None), c.retired_at > start)
    )
    with store.read() as connection:
        rows = connection.execute(ready.order_by(c.tenant_id, c.id)).all()
    for tenant in sorted({row.tenant_id for row in rows}):
        count += _charge_tenant(store, tenant, [row for row in rows if row.tenant_id == tenant], start, end)
    return count


def _charge_tenant(
    store: Store, tenant: str, rows: Sequence[sa.Row[tuple[object, ...]]], start: datetime, end: datetime
) -> int:
    c, prices, count = charges_table.c, Prices(store), 0
    billed_query = sa.select(c.reference).where(
        c.tenant_id == tenant, c.kind == "residency", c.created_at >= start, c.created_at < end
    )
    with store.write() as connection:
        billed_references = set(connection.execute(billed_query).scalars())
        for hour in _hours(start, end):
            price = prices.at(connection, tenant, hour)
            if price is None or not price.plan.adapter_hour_nanos:
                continue
            for row in rows:
                ready_at, retired_at = row.probed_at or row.registered_at, row.retired_at
                is_ready = ready_at < hour + HOUR and (retired_at is None or retired_at > hour)
                if is_ready and residency_reference(row.id, hour) not in billed_references:
                    subject = f"{tenant}/{row.name}@{row.version}"
                    count += post_charge(connection, adapter_hour(row.id, tenant, subject, hour, price))
    return count


def _hours(start: datetime, end: datetime) -> Iterator[datetime]:
    while start < end:
        yield start
        start += HOUR
