"""Credit notes return part of a final invoice's amount. A credit note is final, too.

Amounts are gross: they include the invoice's tax in proportion. The credit notes of an invoice never exceed
its total. Each raises the tenant's credit in the ledger, as a refund.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from serve.billing.invoicing.document import InvoiceDocument, sha256_of
from serve.billing.invoicing.printable import require_printable
from serve.billing.invoicing.store import FINAL, InvoiceState, invoice_of, invoice_row, next_number
from serve.billing.ledger.accounts import lock_account, transfer
from serve.errors import Conflict
from serve.storage.database import Store, UtcDateTime, metadata
from serve.tenants.audit import SYSTEM, record

LINES_MAX = 100

notes_table = sa.Table(
    "credit_notes",
    metadata,
    sa.Column("number", sa.String(24), primary_key=True),
    sa.Column("invoice_number", sa.ForeignKey("final_invoices.number"), nullable=False, index=True),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("issued_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("amount_nanos > 0", name="amount_positive"),
)


class NoteLine(BaseModel):
    """Credits one amount. `line` is the invoice line's position from 1; None if it belongs to no line."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    line: int | None
    text: str
    amount_nanos: int


class NoteDocument(BaseModel):
    """Holds the content of a credit note."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str
    invoice: str
    currency: str
    reason: str
    lines: tuple[NoteLine, ...]
    tax_nanos: int

    @property
    def amount_nanos(self) -> int:
        return sum(line.amount_nanos for line in self.lines)


@dataclass(frozen=True, slots=True)
class CreditNote:
    """Holds a credit note as stored."""

    number: str
    document: NoteDocument
    sha256: str
    issued_at: datetime


class CreditNotes:
    """Issues and lists the credit notes of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def issue(
        self,
        invoice: str,
        amounts: Sequence[tuple[int | None, int]],
        *,
        reason: str,
        at: datetime,
        actor: str = SYSTEM,
    ) -> CreditNote:
        """Credit `amounts` of a final invoice, each (position of a line from 1, or None; nanos).

        Raises Conflict if the invoice is not final, has no such line, or would be credited more than its
        total. Raises UnknownRecord.
        """
        with self._store.write() as connection:
            tenant = invoice_row(connection, invoice).tenant_id
            lock_account(connection, tenant)
            billed = invoice_of(invoice_row(connection, invoice))
            if billed.state not in FINAL or billed.final_number is None:
                state = InvoiceState(billed.state).value
                raise Conflict(f"{invoice} is {state}; only what is final is credited.")
            lines = tuple(_line(billed.document, position, nanos) for position, nanos in amounts)
            total, amount = billed.document.total_nanos, sum(line.amount_nanos for line in lines)
            creditable_nanos = total - credited_nanos(connection, billed.final_number)
            if not 0 < amount <= creditable_nanos:
                raise Conflict(f"{invoice} can be credited up to {creditable_nanos} nanos, not {amount}.")
            document = NoteDocument(
                tenant=tenant,
                invoice=billed.final_number,
                currency=billed.document.currency,
                reason=reason,
                lines=lines,
                tax_nanos=(2 * amount * billed.document.tax_nanos + total) // (2 * total),
            )
            require_printable(document, "The credit note")
            number, document_json = next_number(connection, f"CN-{at:%Y}"), document.model_dump_json()
            note = CreditNote(number, document, sha256_of(number, at, document_json), at)
            row = {
                "number": number,
                "invoice_number": billed.final_number,
                "amount_nanos": amount,
                "document": document_json,
                "sha256": note.sha256,
                "issued_at": at,
            }
            connection.execute(notes_table.insert().values(row))
            transfer(connection, tenant, "refund", amount, reference=number, reason="credit note", at=at)
            audit_details = {"invoice": billed.final_number, "amount_nanos": amount, "reason": reason}
            record(connection, "invoice.credit", number, audit_details, actor=actor, tenant=tenant, at=at)
        return note

    def for_invoice(self, invoice: str) -> list[CreditNote]:
        """Return the invoice's credit notes, oldest first. Raises UnknownRecord."""
        with self._store.read() as connection:
            number = invoice_row(connection, invoice).number
            query = sa.select(notes_table).where(notes_table.c.invoice_number == number)
            return [_note(row) for row in connection.execute(query.order_by(notes_table.c.number))]


def credited_nanos(connection: sa.Connection, number: str) -> int:
    """Return the sum of the invoice's credit notes."""
    c = notes_table.c
    query = sa.select(sa.func.coalesce(sa.func.sum(c.amount_nanos), 0)).where(c.invoice_number == number)
    return int(connection.execute(query).scalar_one())


def _line(document: InvoiceDocument, position: int | None, nanos: int) -> NoteLine:
    if position is None:
        return NoteLine(line=None, text="amount", amount_nanos=nanos)
    if not 1 <= position <= len(document.lines):
        raise Conflict(f"There is no line {position}: there are {len(document.lines)}.")
    return NoteLine(line=position, text=document.lines[position - 1].label, amount_nanos=nanos)


def _note(row: sa.Row[Any]) -> CreditNote:
    document = NoteDocument.model_validate_json(row.document)
    return CreditNote(row.number, document, row.sha256, row.issued_at)
