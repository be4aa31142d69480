"""Adapter residency: an adapter version that is ready in an hour is billed for that hour, once.

Only hours that are over are billed. The steward calls this every hour; what it missed, it catches up with,
up to HOURS_MAX back.
"""

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import adapter_hour, charge, charges_table, residency_reference
from serve.billing.pricing.plans import Prices
from serve.registry.versions import VersionState, adapters_table
from serve.storage.database import Store

HOURS_MAX = 72
HOUR = timedelta(hours=1)


def charge_residency(store: Store, at: datetime) -> int:
    """Bill the adapter-hours before `at` that are not billed yet; how many there were.

    Nothing is billed in hours in which the tenant's plan has no price for it.
    """
    until = at.replace(minute=0, second=0, microsecond=0)
    begin = until - HOURS_MAX * HOUR
    c, made = adapters_table.c, 0
    ready = sa.select(adapters_table).where(
        c.state == VersionState.READY, sa.or_(c.retired_at.is_(None), c.retired_at > begin)
    )
    with store.read() as connection:
        rows = connection.execute(ready.order_by(c.tenant_id, c.id)).all()
    for tenant in sorted({row.tenant_id for row in rows}):
        made += _charge_tenant(store, tenant, [row for row in rows if row.tenant_id == tenant], begin, until)
    return made


def _charge_tenant(
    store: Store, tenant: str, rows: Sequence[sa.Row[tuple[object, ...]]], begin: datetime, until: datetime
) -> int:
    c, prices, made = charges_table.c, Prices(store), 0
    known = sa.select(c.reference).where(
        c.tenant_id == tenant, c.kind == "residency", c.created_at >= begin, c.created_at < until
    )
    with store.write() as connection:
        billed = set(connection.execute(known).scalars())
        for hour in _hours(begin, until):
            price = prices.at(connection, tenant, hour)
            if price is None or not price.plan.adapter_hour_nanos:
                continue
            for row in rows:
                since, retired = row.probed_at or row.registered_at, row.retired_at
                ready = since < hour + HOUR and (retired is None or retired > hour)
                if ready and residency_reference(row.id, hour) not in billed:
                    subject = f"{tenant}/{row.name}@{row.version}"
                    made += charge(connection, adapter_hour(row.id, tenant, subject, hour, price))
    return made


def _hours(begin: datetime, until: datetime) -> Iterator[datetime]:
    while begin < until:
        yield begin
        begin += HOUR
