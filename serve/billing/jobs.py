"""Billing jobs: expire credit grants that are due, and draft the invoices of the last month.

The steward runs both. Both may be repeated, and run in two stewards at a time.
"""

from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.credits.grants import Grant, grant_of, grants_table
from serve.billing.invoicing.calculation import remaining_credit
from serve.billing.invoicing.invoices import Invoices, invoices_table
from serve.billing.ledger.accounts import accounts_table, lock_account, transfer
from serve.billing.metering.rollups import hours_table
from serve.storage.database import Store
from serve.tenants.audit import SYSTEM, record

GRANTS_MAX = 1000


def expire_due(store: Store, at: datetime) -> list[tuple[Grant, int]]:
    """Expire the grants that are due at `at`, each once and in its own transaction.

    What is left of a grant, and is not held by a request, is taken back. At most GRANTS_MAX grants are
    expired. Returns them with the nanos that were taken back.
    """
    c = grants_table.c
    query = sa.select(grants_table).where(c.expires_at <= at, c.expired_nanos.is_(None))
    with store.read() as connection:
        rows = connection.execute(query.order_by(c.expires_at, c.id).limit(GRANTS_MAX))
        grants = [grant_of(row) for row in rows]
    expired = []
    for grant in grants:
        with store.write() as connection:
            taken_nanos = _expire(connection, grant, at)
        if taken_nanos is not None:
            expired.append((grant, taken_nanos))
    return expired


def _expire(connection: sa.Connection, grant: Grant, at: datetime) -> int | None:
    lock_account(connection, grant.tenant)
    c, a = grants_table.c, accounts_table.c
    account = connection.execute(sa.select(accounts_table).where(a.tenant_id == grant.tenant)).one()
    available = account.credit_nanos - account.spent_nanos - account.held_nanos
    taken_nanos: int = max(min(remaining_credit(connection, grant.tenant)[grant.id], available), 0)
    mark_expired = grants_table.update().where(c.id == grant.id, c.expired_nanos.is_(None))
    if connection.execute(mark_expired.values(expired_nanos=taken_nanos)).rowcount == 0:
        return None
    if taken_nanos:
        transfer(
            connection,
            grant.tenant,
            "expire",
            taken_nanos,
            reference=grant.id,
            reason=f"{grant.kind} credit expired",
            at=at,
        )
    audit_details = {"taken_nanos": taken_nanos}
    record(connection, "credit.expire", grant.id, audit_details, actor=SYSTEM, tenant=grant.tenant, at=at)
    return taken_nanos


def draft_due(store: Store, at: datetime) -> list[str]:
    """Create the missing drafts for the month before `at`. Returns their numbers.

    A tenant gets a draft if it has usage or charges in that month. An existing draft is never replaced: its
    reviewer decides when it is created again.
    """
    period = f"{at.replace(day=1) - timedelta(days=1):%Y-%m}"
    billable = [sa.select(t.c.tenant_id).where(t.c.period == period) for t in (hours_table, charges_table)]
    with_invoice = sa.select(invoices_table.c.tenant_id).where(invoices_table.c.period == period)
    with store.read() as connection:
        tenants = set(connection.execute(sa.union(*billable)).scalars())
        tenants -= set(connection.execute(with_invoice).scalars())
    invoices = Invoices(store)
    return [invoices.create(tenant, period, at=at).number for tenant in sorted(tenants)]
