"""Charges: what is billed besides requests. Training, adapters kept ready, corrections of a month.

A charge has a reference that names what it is for, and there is one charge per reference, whoever makes it
and however often. It is a transfer in the ledger as well, in the same transaction.
"""

from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from serve.billing.invoicing.periods import open_periods
from serve.billing.ledger.accounts import lock_account, transfer
from serve.billing.pricing.plans import Prices, PriceVersion
from serve.storage.database import RowId, Store, UtcDateTime, insert, metadata

KINDS = ("training", "residency")

charges_table = sa.Table(
    "charges",
    metadata,
    sa.Column("id", RowId, primary_key=True),
    sa.Column("reference", sa.String(64), nullable=False, unique=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("subject", sa.String(160), nullable=False),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("plan_id", sa.ForeignKey("price_plans.id"), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("period", sa.String(7), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint(f"kind IN {KINDS}", name="kind_known"),
    sa.CheckConstraint("amount_nanos >= 0", name="amount_not_negative"),
    sa.Index("ix_charges_tenant_id_period", "tenant_id", "period"),
    sa.Index("ix_charges_tenant_id_created_at", "tenant_id", "created_at"),
)


@dataclass(frozen=True, slots=True)
class Charge:
    """`quantity` is in the kind's unit: trained tokens, or hours. `subject` is the adapter version."""

    reference: str
    tenant: str
    kind: str
    subject: str
    quantity: int
    plan_id: int
    amount_nanos: int
    created_at: datetime


def charge(connection: sa.Connection, made: Charge) -> bool:
    """Bill `made` in the caller's transaction. False if its reference has been billed before."""
    lock_account(connection, made.tenant)
    (period,) = open_periods(connection, [(made.tenant, made.created_at)])
    row = {
        "reference": made.reference,
        "tenant_id": made.tenant,
        "kind": made.kind,
        "subject": made.subject,
        "quantity": made.quantity,
        "plan_id": made.plan_id,
        "amount_nanos": made.amount_nanos,
        "period": period,
        "created_at": made.created_at,
    }
    inserted = connection.execute(insert(connection, charges_table).on_conflict_do_nothing(), row)
    if inserted.rowcount == 0:
        return False
    return transfer(
        connection,
        made.tenant,
        "charge",
        made.amount_nanos,
        reference=made.reference,
        reason=made.kind,
        at=made.created_at,
    )


def charge_training(
    store: Store,
    connection: sa.Connection,
    *,
    tenant: str,
    adapter_id: int,
    subject: str,
    tokens: int | None,
    at: datetime,
) -> bool:
    """Bill the training of an adapter version, once, when it is registered.

    False if there is nothing to bill: its tokens are not known, no plan is in force, the plan has no price
    for it, or it has been billed.
    """
    price = Prices(store).at(connection, tenant, at)
    if price is None or not tokens or not price.plan.training_nanos_per_mtok:
        return False
    return charge(
        connection,
        Charge(
            reference=f"training:{adapter_id}",
            tenant=tenant,
            kind="training",
            subject=subject,
            quantity=tokens,
            plan_id=price.id,
            amount_nanos=(tokens * price.plan.training_nanos_per_mtok + 500_000) // 1_000_000,
            created_at=at,
        ),
    )


def adapter_hour(adapter_id: int, tenant: str, subject: str, hour: datetime, price: PriceVersion) -> Charge:
    """An adapter version's hour of being ready. `hour` is its beginning."""
    return Charge(
        reference=residency_reference(adapter_id, hour),
        tenant=tenant,
        kind="residency",
        subject=subject,
        quantity=1,
        plan_id=price.id,
        amount_nanos=price.plan.adapter_hour_nanos,
        created_at=hour,
    )


def residency_reference(adapter_id: int, hour: datetime) -> str:
    return f"residency:{adapter_id}:{hour:%Y-%m-%dT%H}"
