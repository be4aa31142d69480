"""The monthly run: each tenant with something to bill has a draft of the month that is over."""

from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.charges import charges_table
from serve.billing.invoice import Invoices, invoices_table
from serve.billing.rollups import hours_table
from serve.db import Store


def draft_due(store: Store, at: datetime) -> list[str]:
    """Make the drafts of the month before `at` that are not there yet; their numbers.

    Only the first: who looks at a draft decides when it is made again.
    """
    period = f"{at.replace(day=1) - timedelta(days=1):%Y-%m}"
    used = [sa.select(t.c.tenant_id).where(t.c.period == period) for t in (hours_table, charges_table)]
    drafted = sa.select(invoices_table.c.tenant_id).where(invoices_table.c.period == period)
    with store.read() as connection:
        tenants = set(connection.execute(sa.union(*used)).scalars())
        tenants -= set(connection.execute(drafted).scalars())
    invoices = Invoices(store)
    return [invoices.create(tenant, period, at=at).number for tenant in sorted(tenants)]
