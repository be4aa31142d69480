"""The monthly run: each tenant with something to bill has a draft of the month that is over.

Credit that expires: what is left of a grant, and is not held by a request, is taken back, once.
"""

from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.credits.grants import Grant, grant_of, grants_table
from serve.billing.invoicing.calculation import credit_left
from serve.billing.invoicing.invoices import Invoices, invoices_table
from serve.billing.ledger.accounts import accounts_table, lock_account, transfer
from serve.billing.metering.rollups import hours_table
from serve.storage.database import Store
from serve.tenants.audit import SYSTEM, record

GRANTS_MAX = 1000


def expire_due(store: Store, at: datetime) -> list[tuple[Grant, int]]:
    """Expire the grants that are due, at most GRANTS_MAX, each in a transaction; what each gave back."""
    c = grants_table.c
    due = sa.select(grants_table).where(c.expires_at <= at, c.expired_nanos.is_(None))
    with store.read() as connection:
        rows = connection.execute(due.order_by(c.expires_at, c.id).limit(GRANTS_MAX))
        grants = [grant_of(row) for row in rows]
    expired = []
    for grant in grants:
        with store.write() as connection:
            taken = _expire(connection, grant, at)
        if taken is not None:
            expired.append((grant, taken))
    return expired


def _expire(connection: sa.Connection, grant: Grant, at: datetime) -> int | None:
    lock_account(connection, grant.tenant)
    c, a = grants_table.c, accounts_table.c
    account = connection.execute(sa.select(accounts_table).where(a.tenant_id == grant.tenant)).one()
    available = account.credit_nanos - account.spent_nanos - account.held_nanos
    taken: int = max(min(credit_left(connection, grant.tenant)[grant.id], available), 0)
    marked = grants_table.update().where(c.id == grant.id, c.expired_nanos.is_(None))
    if connection.execute(marked.values(expired_nanos=taken)).rowcount == 0:
        return None
    if taken:
        transfer(
            connection,
            grant.tenant,
            "expire",
            taken,
            reference=grant.id,
            reason=f"{grant.kind} credit expired",
            at=at,
        )
    said = {"taken_nanos": taken}
    record(connection, "credit.expire", grant.id, said, actor=SYSTEM, tenant=grant.tenant, at=at)
    return taken


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
