"""Invoices bill one tenant's month, and move from draft to paid.

    draft → review → finalized → paid
      ↑       │          └─────→ void      a void invoice stays; the month gets a new draft
      └───────┘

Finalizing is one transaction under the lock of the tenant's account. It closes the month, so that later
settlements are on a later invoice. It computes the document again, which must equal the reviewed one. It
assigns a number. It posts the difference to what was charged at use, so that account and invoices agree.
A final invoice never changes: credit notes correct it (`credit_notes`).
"""

from collections.abc import Callable, Sequence
from datetime import datetime

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.invoicing.calculation import calculate_invoice
from serve.billing.invoicing.credit_notes import credited_nanos
from serve.billing.invoicing.document import InvoiceDocument, sha256_of
from serve.billing.invoicing.periods import period_bounds, periods_table
from serve.billing.invoicing.printable import require_printable
from serve.billing.invoicing.store import (
    FINAL,
    Invoice,
    InvoiceState,
    StateChange,
    add_state,
    final_documents,
    finals_table,
    history,
    invoice_of,
    invoice_row,
    invoices_table,
    newest_revision,
    next_number,
    select_invoices,
    states_table,
)
from serve.billing.ledger.accounts import lock_account, transfer
from serve.billing.metering.rollups import hours_table
from serve.errors import Conflict, InvalidRequest, UnknownRecord
from serve.storage.database import Store, insert
from serve.storage.pagination import Page
from serve.tenants.audit import SYSTEM, record

__all__ = ["Invoice", "InvoiceState", "Invoices", "difference_nanos", "invoices_table", "period_bounds"]

TransitionHook = Callable[[sa.Connection, Invoice, StateChange], None]


class Invoices:
    """Manages the invoices of one store. Methods block and accept final numbers and draft numbers."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, tenant: str, period: str, *, at: datetime, actor: str = SYSTEM) -> Invoice:
        """Create the invoice of `tenant` for the month `period` ("2026-11"), or return the current one.

        A final invoice is returned as it is, and so is a draft that would not change. Otherwise a new
        revision is created. Raises OperatorError for a malformed period, UnknownRecord for an unknown tenant.
        """
        period_bounds(period)
        try:
            with self._store.write() as connection:
                lock_account(connection, tenant)
                row = newest_revision(connection, tenant, period)
                current = None if row is None else invoice_of(row)
                if current is not None and current.state in FINAL:
                    return current
                document = calculate_invoice(self._store, connection, tenant, period)
                if (
                    current is not None
                    and current.state != InvoiceState.VOID
                    and current.document == document
                ):
                    return current
                revision = current.revision + 1 if current else 1
                values = {
                    "tenant_id": tenant,
                    "period": period,
                    "revision": revision,
                    "total_nanos": document.total_nanos,
                    "document": document.model_dump_json(),
                    "created_at": at,
                }
                inserted = connection.execute(invoices_table.insert().values(values))
                assert inserted.inserted_primary_key is not None
                invoice = Invoice(inserted.inserted_primary_key[0], document, revision, at)
                add_state(connection, invoice.id, 1, StateChange(InvoiceState.DRAFT, actor, "created", at))
                audit_details = {"total_nanos": document.total_nanos}
                record(
                    connection,
                    "invoice.create",
                    invoice.draft_number,
                    audit_details,
                    actor=actor,
                    tenant=tenant,
                    at=at,
                )
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error
        return invoice

    def get(self, number: str, *, tenant: str | None = None) -> Invoice:
        """Return an invoice. Raises UnknownRecord; with `tenant`, also for another tenant's invoice."""
        with self._store.read() as connection:
            row = invoice_row(connection, number)
        if tenant is not None and row.tenant_id != tenant:
            raise UnknownRecord(f"There is no invoice '{number[:100]}'.")
        return invoice_of(row)

    def history(self, number: str) -> Sequence[StateChange]:
        """Return the invoice's state changes, oldest first. Raises UnknownRecord."""
        with self._store.read() as connection:
            return history(connection, invoice_row(connection, number).id)

    def page(
        self,
        *,
        tenant: str | None = None,
        period: str | None = None,
        states: Sequence[InvoiceState] = tuple(InvoiceState),
        after: str | None = None,
        limit: int = 20,
    ) -> Page[Invoice]:
        """Return invoices, newest first, behind the number `after`. Raises InvalidRequest for a bad one."""
        c = invoices_table.c
        query = select_invoices().where(states_table.c.state.in_([state.value for state in states]))
        if tenant is not None:
            query = query.where(c.tenant_id == tenant)
        if period is not None:
            query = query.where(c.period == period)
        with self._store.read() as connection:
            if after is not None:
                try:
                    cursor = invoice_row(connection, after)
                except UnknownRecord:
                    cursor = None
                if cursor is None or tenant not in (None, cursor.tenant_id):
                    message = "'after' is not the id of an item of this list."
                    raise InvalidRequest(message, "after", "invalid_value")
                query = query.where(c.id < cursor.id)
            rows = connection.execute(query.order_by(c.id.desc()).limit(limit + 1)).all()
        return Page([invoice_of(row) for row in rows[:limit]], len(rows) > limit)

    def review(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Submit a draft for review. Raises Conflict, UnknownRecord."""
        return self._transition(
            number, InvoiceState.DRAFT, StateChange(InvoiceState.REVIEW, actor, reason, at)
        )

    def reopen(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Return an invoice from review to draft. Raises Conflict, UnknownRecord."""
        return self._transition(
            number, InvoiceState.REVIEW, StateChange(InvoiceState.DRAFT, actor, reason, at)
        )

    def finalize(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Finalize a reviewed invoice and close its month.

        Raises Conflict if it is not in review, if its month is not over, if an earlier month has usage that
        is on no final invoice, if its document has changed since the review, or if it has letters that no
        font has. Raises UnknownRecord.
        """
        change = StateChange(InvoiceState.FINALIZED, actor, reason, at)
        return self._transition(number, InvoiceState.REVIEW, change, self._finalize)

    def pay(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Record the payment of what is payable, less credit notes. Raises Conflict, UnknownRecord."""
        return self._transition(
            number, InvoiceState.FINALIZED, StateChange(InvoiceState.PAID, actor, reason, at), _post_payment
        )

    def void(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Void a finalized invoice and reverse its postings. `create` then makes a new draft of the month.

        The month stays closed: later usage stays on later invoices. Raises Conflict, UnknownRecord.
        """
        return self._transition(
            number,
            InvoiceState.FINALIZED,
            StateChange(InvoiceState.VOID, actor, reason, at),
            _reverse_postings,
        )

    def recalculate(self, number: str) -> InvoiceDocument:
        """Compute a final invoice's document again; it must be equal. Raises Conflict, UnknownRecord."""
        with self._store.read() as connection:
            row = invoice_row(connection, number)
            if row.number is None:
                raise Conflict(f"{number} is not final.")
            document = calculate_invoice(
                self._store, connection, row.tenant_id, row.period, as_of=row.issued_at
            )
        final_document = invoice_of(row).document
        return document.model_copy(update={"seller": final_document.seller, "buyer": final_document.buyer})

    def _transition(
        self, number: str, source: InvoiceState, change: StateChange, hook: TransitionHook | None = None
    ) -> Invoice:
        with self._store.write() as connection:
            tenant = invoice_row(connection, number).tenant_id
            lock_account(connection, tenant)
            row = invoice_row(connection, number)
            invoice = invoice_of(row)
            current = newest_revision(connection, tenant, row.period)
            if current is not None and current.id != row.id:
                raise Conflict(f"{number} has been superseded by revision {current.revision}.")
            if invoice.state != source:
                state, required = _state_phrase(invoice.state), _state_phrase(source)
                raise Conflict(f"{number} is {state}; only {required} becomes {change.state}.")
            if hook is not None:
                hook(connection, invoice, change)
            add_state(connection, row.id, row.position + 1, change)
            updated = invoice_of(invoice_row(connection, invoice.draft_number))
            audit_details = {"from": source.value, "reason": change.reason, "draft": invoice.draft_number}
            record(
                connection,
                f"invoice.{change.state}",
                updated.number,
                audit_details,
                actor=change.actor,
                tenant=tenant,
                at=change.at,
            )
        return updated

    def _finalize(self, connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
        tenant, period, at = invoice.document.tenant, invoice.document.period, change.at
        if at < period_bounds(period)[1]:
            raise Conflict(f"{period} is not over.")
        if (earlier_period := _earliest_unbilled(connection, tenant, period)) is not None:
            raise Conflict(f"{earlier_period} has usage that is on no final invoice: finalize it first.")
        close_period = insert(connection, periods_table).on_conflict_do_nothing()
        connection.execute(close_period, {"tenant_id": tenant, "period": period, "closed_at": at})
        document = calculate_invoice(self._store, connection, tenant, period)
        if document != invoice.document:
            raise Conflict(f"{invoice.number} would say something else by now: create and review it again.")
        require_printable(document, invoice.number)
        number, document_json = next_number(connection, f"INV-{at:%Y}"), document.model_dump_json()
        row = {
            "number": number,
            "invoice_id": invoice.id,
            "tenant_id": tenant,
            "period": period,
            "document": document_json,
            "sha256": sha256_of(number, at, document_json),
            "issued_at": at,
        }
        connection.execute(finals_table.insert().values(row))
        _post_difference(connection, tenant, difference_nanos(document), number, "invoice", at)


def difference_nanos(document: InvoiceDocument) -> int:
    """Return what the account owes for the month beyond what was charged at use."""
    return document.subtotal_nanos + document.tax_nanos - document.list_nanos


def _post_difference(
    connection: sa.Connection, tenant: str, nanos: int, reference: str, reason: str, at: datetime
) -> None:
    if nanos:
        kind = "charge" if nanos > 0 else "refund"
        transfer(connection, tenant, kind, abs(nanos), reference=reference, reason=reason, at=at)


def _post_payment(connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
    due_nanos = invoice.document.payable_nanos - credited_nanos(connection, invoice.number)
    if due_nanos > 0:
        transfer(
            connection,
            invoice.document.tenant,
            "payment",
            due_nanos,
            reference=f"{invoice.number}:payment",
            reason="invoice paid",
            at=change.at,
        )


def _reverse_postings(connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
    if credited_nanos(connection, invoice.number):
        raise Conflict(f"{invoice.number} has credit notes: correct it by more of them.")
    nanos = -difference_nanos(invoice.document)
    reference = f"{invoice.number}:void"
    _post_difference(connection, invoice.document.tenant, nanos, reference, "invoice void", change.at)


def _earliest_unbilled(connection: sa.Connection, tenant: str, period: str) -> str | None:
    """Return the first month before `period` that has usage or charges but no final invoice."""
    final_periods = list(final_documents(connection, tenant))
    first_periods = []
    for table in (hours_table, charges_table):
        c = table.c
        query = sa.select(sa.func.min(c.period))
        where = (c.tenant_id == tenant, c.period < period, c.period.not_in(final_periods))
        first_periods.append(connection.execute(query.where(*where)).scalar())
    return min((month for month in first_periods if month is not None), default=None)


def _state_phrase(state: InvoiceState) -> str:
    return {InvoiceState.REVIEW: "in review", InvoiceState.DRAFT: "a draft"}.get(state, state.value)
