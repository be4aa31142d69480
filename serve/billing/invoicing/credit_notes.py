"""Credit notes return part of a final invoice's amount. A credit note is final, too.

Amounts are gross, in the currency's smallest unit. The credit notes of an invoice never exceed what was paid
for it (`InvoiceDocument.creditable_nanos`), nor those of a line its gross amount, rounded up to that unit. A
line that asks for more than what is left, because lines were rounded, takes what is left. Taxes are
cumulative differences: once all is credited, they add up to the invoice's tax. Each note raises the tenant's
credit in the ledger, as a refund.
"""

from collections import Counter
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
from serve.billing.money import labelled, unit_nanos
from serve.errors import Conflict, InvalidRequest
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

        Raises Conflict if the invoice is not final, has no such line, or would be credited more than was
        paid. Raises InvalidRequest for less than the smallest unit, or parts of it. Raises UnknownRecord.
        """
        with self._store.write() as connection:
            tenant = invoice_row(connection, invoice).tenant_id
            lock_account(connection, tenant)
            billed = invoice_of(invoice_row(connection, invoice))
            if billed.state not in FINAL or billed.final_number is None:
                state = InvoiceState(billed.state).value
                raise Conflict(f"{invoice} is {state}; only what is final is credited.")
            earlier = [note.document for note in _notes(connection, billed.final_number)]
            document = credit(billed.document, billed.final_number, earlier, amounts, reason=reason)
            require_printable(document, "The credit note")
            amount = document.amount_nanos
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
            return _notes(connection, number)


def credited_nanos(connection: sa.Connection, number: str) -> int:
    """Return the sum of the invoice's credit notes."""
    c = notes_table.c
    query = sa.select(sa.func.coalesce(sa.func.sum(c.amount_nanos), 0)).where(c.invoice_number == number)
    return int(connection.execute(query).scalar_one())


def credit(
    document: InvoiceDocument,
    invoice_number: str,
    earlier: Sequence[NoteDocument],
    amounts: Sequence[tuple[int | None, int]],
    *,
    reason: str,
) -> NoteDocument:
    """Return the note that credits `amounts` after `earlier` ones. Raises Conflict, InvalidRequest."""
    lines = _credited_lines(document, earlier, amounts)
    credited_nanos = sum(note.amount_nanos for note in earlier) + sum(line.amount_nanos for line in lines)
    return NoteDocument(
        tenant=document.tenant,
        invoice=invoice_number,
        currency=document.currency,
        reason=reason,
        lines=lines,
        tax_nanos=_tax_until(document, credited_nanos) - sum(note.tax_nanos for note in earlier),
    )


def _credited_lines(
    document: InvoiceDocument, earlier: Sequence[NoteDocument], amounts: Sequence[tuple[int | None, int]]
) -> tuple[NoteLine, ...]:
    """Bound each amount by its line and by what is left of the invoice. Raises Conflict, InvalidRequest."""
    currency, credited_by_line = document.currency, Counter[int | None]()
    for line in (line for note in earlier for line in note.lines):
        credited_by_line[line.line] += line.amount_nanos
    left_nanos = document.creditable_nanos - credited_by_line.total()
    lines = []
    for position, asked_nanos in amounts:
        if asked_nanos <= 0 or asked_nanos % unit_nanos(currency):
            unit, asked = labelled(unit_nanos(currency), currency), labelled(asked_nanos, currency)
            raise InvalidRequest(f"What is credited is in whole steps of {unit}, not {asked}.", "lines")
        text, slack_nanos = "amount", 0
        if position is not None:
            text, line_nanos = _label(document, position), _gross_nanos(document, position)
            if asked_nanos > (line_left_nanos := line_nanos - credited_by_line[position]):
                line_left, asked = (
                    labelled(max(line_left_nanos, 0), currency),
                    labelled(asked_nanos, currency),
                )
                raise Conflict(f"Line {position} can be credited up to {line_left}, not {asked}.")
            slack_nanos = len(document.lines) * unit_nanos(currency)
        nanos = min(asked_nanos, left_nanos)
        if nanos <= 0 or asked_nanos - nanos > slack_nanos:
            left, asked = labelled(max(left_nanos, 0), currency), labelled(asked_nanos, currency)
            raise Conflict(f"The invoice can be credited up to {left}, not {asked}.")
        lines.append(NoteLine(line=position, text=text, amount_nanos=nanos))
        credited_by_line[position] += nanos
        left_nanos -= nanos
    if not lines:
        raise Conflict("A credit note credits at least one amount.")
    return tuple(lines)


def _label(document: InvoiceDocument, position: int) -> str:
    if not 1 <= position <= len(document.lines):
        raise Conflict(f"There is no line {position}: there are {len(document.lines)}.")
    return document.lines[position - 1].label


def _gross_nanos(document: InvoiceDocument, position: int) -> int:
    """Return the line with its share of promotions and tax, rounded up to the currency's smallest unit."""
    unit, subtotal = unit_nanos(document.currency), document.subtotal_nanos
    if subtotal <= 0:
        return 0
    return -(-document.lines[position - 1].amount_nanos * document.total_nanos // (subtotal * unit)) * unit


def _tax_until(document: InvoiceDocument, credited_nanos: int) -> int:
    """Return the tax in the first `credited_nanos` of the invoice: in whole units before all is."""
    tax, unit, whole = document.tax_nanos, unit_nanos(document.currency), document.creditable_nanos
    if credited_nanos == whole:
        return tax
    share = (2 * tax * credited_nanos + whole * unit) // (2 * whole * unit)
    return min(share, tax // unit) * unit


def _notes(connection: sa.Connection, invoice_number: str | None) -> list[CreditNote]:
    query = sa.select(notes_table).where(notes_table.c.invoice_number == invoice_number)
    return [_note(row) for row in connection.execute(query.order_by(notes_table.c.number))]


def _note(row: sa.Row[Any]) -> CreditNote:
    document = NoteDocument.model_validate_json(row.document)
    return CreditNote(row.number, document, row.sha256, row.issued_at)
