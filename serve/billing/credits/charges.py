"""Charges bill what is not a request: training, and hours in which an adapter was ready.

A charge has a reference that names what it is for. There is one charge per reference, however often it is
posted. Each charge is also a transfer in the ledger, in the same transaction.
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
    """Bills an adapter version, the `subject`. `quantity` is in trained tokens or hours, by `kind`."""

    reference: str
    tenant: str
    kind: str
    subject: str
    quantity: int
    plan_id: int
    amount_nanos: int
    created_at: datetime


def post_charge(connection: sa.Connection, charge: Charge) -> bool:
    """Post `charge` in the caller's transaction. False if its reference was posted before."""
    lock_account(connection, charge.tenant)
    (period,) = open_periods(connection, [(charge.tenant, charge.created_at)])
    row = {
        "reference": charge.reference,
        "tenant_id": charge.tenant,
        "kind": charge.kind,
        "subject": charge.subject,
        "quantity": charge.quantity,
        "plan_id": charge.plan_id,
        "amount_nanos": charge.amount_nanos,
        "period": period,
        "created_at": charge.created_at,
    }
    inserted = connection.execute(insert(connection, charges_table).on_conflict_do_nothing(), row)
    if inserted.rowcount == 0:
        return False
    return transfer(
        connection,
        charge.tenant,
        "charge",
        charge.amount_nanos,
        reference=charge.reference,
        reason=charge.kind,
        at=charge.created_at,
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

    False if there is nothing to bill: its token count is unknown, no plan is in force, the plan has no price
    for it, or it was billed before.
    """
    price = Prices(store).at(connection, tenant, at)
    if price is None or not tokens or not price.plan.training_nanos_per_mtok:
        return False
    return post_charge(
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
    """Return the charge for one hour in which an adapter version was ready. `hour` is the hour's start."""
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
