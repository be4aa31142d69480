"""Accounts and the transfers between them: double entry, in integers, append-only.

Each transfer names the account it debits and the one it credits (docs.tigerbeetle.com, "Debits and
Credits"). A tenant's row of `accounts` keeps the sums that decide whether there is credit. The store
refuses to change a transfer (migration 0008). (request_id, phase) is unique.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from serve.billing.pricing.currencies import currency_of
from serve.storage.database import RowId, UtcDateTime, insert, metadata

HOLD_PHASE, FINAL_PHASE = 1, 2
REVENUE, PLATFORM = "revenue", "platform"
KINDS = ("hold", "settle", "void", "grant", "withdraw", "expire", "charge", "refund", "payment")

accounts_table = sa.Table(
    "accounts",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("credit_nanos", sa.BigInteger, nullable=False),
    sa.Column("spent_nanos", sa.BigInteger, nullable=False),
    sa.Column("held_nanos", sa.BigInteger, nullable=False),
    sa.CheckConstraint("held_nanos >= 0", name="held_not_negative"),
)

transfers_table = sa.Table(
    "transfers",
    metadata,
    sa.Column("id", RowId, primary_key=True),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("phase", sa.SmallInteger, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("debit", sa.String(63), nullable=False),
    sa.Column("credit", sa.String(63), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(64)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("request_id", "phase"),
    sa.CheckConstraint("amount_nanos >= 0", name="amount_not_negative"),
    sa.CheckConstraint(f"kind IN {KINDS}", name="kind_known"),
    sa.Index("ix_transfers_tenant_id_kind", "tenant_id", "kind"),
)

holds_table = sa.Table(
    "open_holds",
    metadata,
    sa.Column("request_id", sa.String(64), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("budgets", sa.Text),
    sa.Column("terms", sa.Text),
    sa.Column("owner", sa.String(64)),
    sa.Column("lease_expires_at", UtcDateTime, nullable=False, index=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
)


@dataclass(frozen=True, slots=True)
class Account:
    """Holds a tenant's balance in nanos of its currency. Available is credit − spent − held."""

    tenant: str
    credit_nanos: int
    spent_nanos: int
    held_nanos: int
    currency: str

    @property
    def available_nanos(self) -> int:
        return self.credit_nanos - self.spent_nanos - self.held_nanos


def transfer(
    connection: sa.Connection,
    tenant: str,
    kind: str,
    amount_nanos: int,
    *,
    reference: str,
    reason: str,
    at: datetime,
) -> bool:
    """Move money that belongs to no request, in the caller's transaction, exactly once per `reference`.

    A grant, payment or refund raises the tenant's credit. A withdrawal or expiry lowers it. A charge is
    spent. The available credit is not checked. False if `reference` has been moved before.
    """
    raises_credit = kind in ("grant", "payment", "refund")
    other = REVENUE if kind in ("charge", "refund") else PLATFORM
    row = {
        "request_id": reference,
        "phase": FINAL_PHASE,
        "kind": kind,
        "tenant_id": tenant,
        "debit": other if raises_credit else tenant,
        "credit": tenant if raises_credit else other,
        "amount_nanos": amount_nanos,
        "reason": reason[:64],
        "created_at": at,
    }
    inserted = connection.execute(insert(connection, transfers_table).on_conflict_do_nothing(), row)
    if inserted.rowcount == 0:
        return False
    c = accounts_table.c
    if kind == "charge":
        values = {"spent_nanos": c.spent_nanos + amount_nanos}
    else:
        values = {"credit_nanos": c.credit_nanos + (amount_nanos if raises_credit else -amount_nanos)}
    connection.execute(accounts_table.update().where(c.tenant_id == tenant).values(values))
    return True


_LOCK = (
    sa.select(accounts_table.c.tenant_id)
    .where(accounts_table.c.tenant_id.in_(sa.bindparam("tenants", expanding=True)))
    .order_by(accounts_table.c.tenant_id)
    .with_for_update()
)


def lock_account(connection: sa.Connection, tenant: str) -> None:
    """Lock the tenant's account: no settlement for it commits until the caller's transaction ends."""
    lock(connection, [tenant])


def lock(connection: sa.Connection, tenants: Iterable[str]) -> None:
    if connection.dialect.name == "sqlite":
        return  # a write transaction has the whole database there
    connection.execute(_LOCK, {"tenants": sorted(set(tenants))}).all()


def transfer_row(
    request_id: str, phase: int, kind: str, tenant: str, amount: int, reason: str | None, at: datetime
) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "phase": phase,
        "kind": kind,
        "tenant_id": tenant,
        "debit": tenant,
        "credit": REVENUE,
        "amount_nanos": amount,
        "reason": reason,
        "created_at": at,
    }


def account_of(connection: sa.Connection, tenant: str) -> Account | None:
    row = connection.execute(sa.select(accounts_table).where(accounts_table.c.tenant_id == tenant)).first()
    if row is None:
        return None
    currency = currency_of(connection, tenant)
    return Account(row.tenant_id, row.credit_nanos, row.spent_nanos, row.held_nanos, currency)
