"""Stores invoices: their revisions, state changes and final documents, append-only.

The store refuses to change or delete any of it; a state is a new row.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa

from serve.billing.invoicing.document import InvoiceDocument
from serve.billing.invoicing.periods import period_bounds
from serve.errors import UnknownRecord
from serve.storage.database import UtcDateTime, insert, metadata


class InvoiceState(StrEnum):
    """Names the states of an invoice; `invoices` draws the transitions."""

    DRAFT = "draft"
    REVIEW = "review"
    FINALIZED = "finalized"
    PAID = "paid"
    VOID = "void"


FINAL = (InvoiceState.FINALIZED, InvoiceState.PAID)

invoices_table = sa.Table(
    "invoices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("period", sa.String(7), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("total_nanos", sa.BigInteger, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("tenant_id", "period", "revision"),
)

states_table = sa.Table(
    "invoice_states",
    metadata,
    sa.Column("invoice_id", sa.ForeignKey("invoices.id"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("actor", sa.String(128), nullable=False),
    sa.Column("reason", sa.String(200), nullable=False),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.CheckConstraint(f"state IN {tuple(str(state) for state in InvoiceState)}", name="state_known"),
)

numbers_table = sa.Table(
    "invoice_numbers",
    metadata,
    sa.Column("series", sa.String(16), primary_key=True),
    sa.Column("last", sa.Integer, nullable=False),
)

finals_table = sa.Table(
    "final_invoices",
    metadata,
    sa.Column("number", sa.String(24), primary_key=True),
    sa.Column("invoice_id", sa.ForeignKey("invoices.id"), nullable=False, unique=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("period", sa.String(7), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("issued_at", UtcDateTime, nullable=False),
    sa.Index("ix_final_invoices_tenant_id_period", "tenant_id", "period"),
)


@dataclass(frozen=True, slots=True)
class StateChange:
    """Records a new state of an invoice, with who set it and why."""

    state: InvoiceState
    actor: str
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Invoice:
    """Holds one revision of a month's invoice. A final one has a `final_number`, `issued_at` and `sha256`."""

    id: int
    document: InvoiceDocument
    revision: int
    created_at: datetime
    state: InvoiceState = InvoiceState.DRAFT
    final_number: str | None = None
    issued_at: datetime | None = None
    sha256: str | None = None

    @property
    def draft_number(self) -> str:
        return f"{self.document.tenant}-{self.document.period}-r{self.revision}"

    @property
    def number(self) -> str:
        return self.final_number or self.draft_number

    @property
    def is_draft(self) -> bool:
        """Not final: what it says may still change."""
        return self.final_number is None

    @property
    def is_partial(self) -> bool:
        """True if the draft was made before its month was over, so that more usage can follow."""
        return self.is_draft and self.created_at < period_bounds(self.document.period)[1]


def select_invoices() -> sa.Select[Any]:
    """Select revisions with their current state and final number."""
    i, s, f = invoices_table.c, states_table.c, finals_table.c
    all_states = states_table.alias()
    same_invoice = all_states.c.invoice_id == i.id
    latest_position = sa.select(sa.func.max(all_states.c.position)).where(same_invoice).scalar_subquery()
    query = sa.select(invoices_table, s.state, s.position, f.number, f.issued_at, f.sha256)
    joined = invoices_table.join(states_table, sa.and_(s.invoice_id == i.id, s.position == latest_position))
    return query.select_from(joined.outerjoin(finals_table, f.invoice_id == i.id))


def invoice_of(row: sa.Row[Any]) -> Invoice:
    return Invoice(
        row.id,
        InvoiceDocument.model_validate_json(row.document),
        row.revision,
        row.created_at,
        InvoiceState(row.state),
        row.number,
        row.issued_at,
        row.sha256,
    )


def invoice_row(connection: sa.Connection, number: str) -> sa.Row[Any]:
    """Return an invoice's row by its final or draft number. Raises UnknownRecord."""
    c = invoices_table.c
    query, draft = select_invoices(), re.fullmatch(r"(.{1,63})-([0-9]{4}-[0-9]{2})-r([0-9]{1,9})", number)
    if draft:
        query = query.where(
            c.tenant_id == draft[1], c.period == draft[2], c.revision == min(int(draft[3]), 2**31 - 1)
        )
    else:
        query = query.where(finals_table.c.number == number)
    row = connection.execute(query).first() if number.isprintable() else None
    if row is None:
        raise UnknownRecord(f"There is no invoice '{number[:100]}'.")
    return row


def newest_revision(connection: sa.Connection, tenant: str, period: str) -> sa.Row[Any] | None:
    c = invoices_table.c
    query = select_invoices().where(c.tenant_id == tenant, c.period == period)
    return connection.execute(query.order_by(c.revision.desc()).limit(1)).first()


def final_documents(
    connection: sa.Connection, tenant: str, *, as_of: datetime | None = None
) -> dict[str, InvoiceDocument]:
    """Return, by period, the final documents that are not void, now or just before `as_of`."""
    f, s = finals_table.c, states_table.c
    voided = sa.select(s.invoice_id).where(s.state == InvoiceState.VOID)
    query = sa.select(f.period, f.document).where(f.tenant_id == tenant)
    if as_of is not None:
        query, voided = query.where(f.issued_at < as_of), voided.where(s.at < as_of)
    rows = connection.execute(query.where(f.invoice_id.not_in(voided)))
    return {row.period: InvoiceDocument.model_validate_json(row.document) for row in rows}


def add_state(
    connection: sa.Connection,
    invoice_id: int,
    position: int,
    change: StateChange,
) -> None:
    row = {
        "invoice_id": invoice_id,
        "position": position,
        "state": change.state.value,
        "actor": change.actor[:128],
        "reason": change.reason[:200],
        "at": change.at,
    }
    connection.execute(states_table.insert().values(row))


def history(connection: sa.Connection, invoice_id: int) -> Sequence[StateChange]:
    c = states_table.c
    rows = connection.execute(sa.select(states_table).where(c.invoice_id == invoice_id).order_by(c.position))
    return [StateChange(InvoiceState(row.state), row.actor, row.reason, row.at) for row in rows]


def next_number(connection: sa.Connection, series: str) -> str:
    """Return the next number of `series` ("INV-2026"). It rolls back with its transaction: no gaps."""
    c = numbers_table.c
    upsert = insert(connection, numbers_table).values(series=series, last=1)
    upsert = upsert.on_conflict_do_update(index_elements=[c.series], set_={"last": c.last + 1})
    last = connection.execute(upsert.returning(c.last)).scalar_one()
    return f"{series}-{last:06d}"
