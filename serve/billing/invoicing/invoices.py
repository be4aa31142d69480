"""Invoices: one tenant's month, from draft to paid.

    draft → review → finalized → paid
      ↑       │          └─────→ void      what is void stays; the month gets a new draft
      └───────┘

Finalizing is one transaction under the lock of the tenant's account: it closes the month, so that whatever
is settled later is on a later invoice; computes the document once more, which must be what was reviewed;
gives it a number; and posts the difference to what was charged when it was used, so that account and
invoices agree. Nothing that is final ever changes: credit notes correct it (`credit_notes`).
"""

from collections.abc import Callable, Sequence
from datetime import datetime

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.invoicing.calculation import statement
from serve.billing.invoicing.credit_notes import credited_nanos
from serve.billing.invoicing.document import InvoiceDocument, sha256_of
from serve.billing.invoicing.periods import period_bounds, periods_table
from serve.billing.invoicing.store import (
    FINAL,
    Invoice,
    InvoiceState,
    StateChange,
    add_state,
    finals_table,
    find,
    history,
    invoice_of,
    invoices_table,
    live_finals,
    newest,
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

Also = Callable[[sa.Connection, Invoice, StateChange], None]


class Invoices:
    """The invoices of one store. Methods block. Numbers are final ones or drafts'."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(self, tenant: str, period: str, *, at: datetime, actor: str = SYSTEM) -> Invoice:
        """The invoice of `tenant` for the month `period` ("2026-11").

        What is final stays as it is, and so does a draft that would say the same; else there is a revision.

        Raises OperatorError for a malformed period, UnknownRecord for an unknown tenant.
        """
        period_bounds(period)
        try:
            with self._store.write() as connection:
                lock_account(connection, tenant)
                row = newest(connection, tenant, period)
                before = None if row is None else invoice_of(row)
                if before is not None and before.state in FINAL:
                    return before
                document = statement(self._store, connection, tenant, period)
                if before is not None and before.state != InvoiceState.VOID and before.document == document:
                    return before
                revision = before.revision + 1 if before else 1
                values = {
                    "tenant_id": tenant,
                    "period": period,
                    "revision": revision,
                    "total_nanos": document.total_nanos,
                    "document": document.model_dump_json(),
                    "created_at": at,
                }
                made = connection.execute(invoices_table.insert().values(values))
                assert made.inserted_primary_key is not None
                invoice = Invoice(made.inserted_primary_key[0], document, revision, at)
                add_state(connection, invoice.id, 1, StateChange(InvoiceState.DRAFT, actor, "created", at))
                said = {"total_nanos": document.total_nanos}
                record(
                    connection,
                    "invoice.create",
                    invoice.draft_number,
                    said,
                    actor=actor,
                    tenant=tenant,
                    at=at,
                )
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error
        return invoice

    def get(self, number: str, *, tenant: str | None = None) -> Invoice:
        """Raises UnknownRecord; with `tenant`, also for another tenant's."""
        with self._store.read() as connection:
            row = find(connection, number)
        if tenant is not None and row.tenant_id != tenant:
            raise UnknownRecord(f"There is no invoice '{number[:100]}'.")
        return invoice_of(row)

    def history(self, number: str) -> Sequence[StateChange]:
        """Its states, oldest first, with who brought them about and why. Raises UnknownRecord."""
        with self._store.read() as connection:
            return history(connection, find(connection, number).id)

    def page(
        self,
        *,
        tenant: str | None = None,
        period: str | None = None,
        states: Sequence[InvoiceState] = tuple(InvoiceState),
        after: str | None = None,
        limit: int = 20,
    ) -> Page[Invoice]:
        """Newest first, behind the invoice of the number `after`. Raises InvalidRequest if there is none."""
        c = invoices_table.c
        query = select_invoices().where(states_table.c.state.in_([state.value for state in states]))
        if tenant is not None:
            query = query.where(c.tenant_id == tenant)
        if period is not None:
            query = query.where(c.period == period)
        with self._store.read() as connection:
            if after is not None:
                try:
                    cursor = find(connection, after)
                except UnknownRecord:
                    cursor = None
                if cursor is None or tenant not in (None, cursor.tenant_id):
                    said = "'after' is not the id of an item of this list."
                    raise InvalidRequest(said, "after", "invalid_value")
                query = query.where(c.id < cursor.id)
            rows = connection.execute(query.order_by(c.id.desc()).limit(limit + 1)).all()
        return Page([invoice_of(row) for row in rows[:limit]], len(rows) > limit)

    def review(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """A draft is to be looked at before it becomes final. Raises Conflict, UnknownRecord."""
        return self._move(number, InvoiceState.DRAFT, StateChange(InvoiceState.REVIEW, actor, reason, at))

    def reopen(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """What was to be reviewed is a draft again. Raises Conflict, UnknownRecord."""
        return self._move(number, InvoiceState.REVIEW, StateChange(InvoiceState.DRAFT, actor, reason, at))

    def finalize(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """Freeze a reviewed invoice, and close its month.

        Raises Conflict if it is not in review, its month is not over, an earlier month has usage that is not
        on a final invoice, or it would no longer say what was reviewed; UnknownRecord.
        """
        change = StateChange(InvoiceState.FINALIZED, actor, reason, at)
        return self._move(number, InvoiceState.REVIEW, change, self._freeze)

    def pay(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """What was payable, less what was credited, has been paid. Raises Conflict, UnknownRecord."""
        return self._move(
            number, InvoiceState.FINALIZED, StateChange(InvoiceState.PAID, actor, reason, at), _receive
        )

    def void(self, number: str, *, at: datetime, actor: str = SYSTEM, reason: str = "") -> Invoice:
        """It was wrong as a whole: its postings are reversed, and `create` makes a new draft of the month.

        The month stays closed: late usage is on later invoices, as it was. Raises Conflict, UnknownRecord.
        """
        return self._move(
            number, InvoiceState.FINALIZED, StateChange(InvoiceState.VOID, actor, reason, at), _reverse
        )

    def recomputed(self, number: str) -> InvoiceDocument:
        """What a final invoice would say if it were made again: the same. Raises Conflict, UnknownRecord."""
        with self._store.read() as connection:
            row = find(connection, number)
            if row.number is None:
                raise Conflict(f"{number} is not final.")
            made = statement(self._store, connection, row.tenant_id, row.period, as_of=row.issued_at)
        frozen = invoice_of(row).document
        return made.model_copy(update={"seller": frozen.seller, "buyer": frozen.buyer})

    def _move(
        self, number: str, source: InvoiceState, change: StateChange, also: Also | None = None
    ) -> Invoice:
        with self._store.write() as connection:
            tenant = find(connection, number).tenant_id
            lock_account(connection, tenant)
            row = find(connection, number)
            invoice = invoice_of(row)
            current = newest(connection, tenant, row.period)
            if current is not None and current.id != row.id:
                raise Conflict(f"{number} has been superseded by revision {current.revision}.")
            if invoice.state != source:
                raise Conflict(
                    f"{number} is {_named(invoice.state)}; only {_named(source)} becomes {change.state}."
                )
            if also is not None:
                also(connection, invoice, change)
            add_state(connection, row.id, row.position + 1, change)
            moved = invoice_of(find(connection, invoice.draft_number))
            said = {"from": source.value, "reason": change.reason, "draft": invoice.draft_number}
            record(
                connection,
                f"invoice.{change.state}",
                moved.number,
                said,
                actor=change.actor,
                tenant=tenant,
                at=change.at,
            )
        return moved

    def _freeze(self, connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
        tenant, period, at = invoice.document.tenant, invoice.document.period, change.at
        if at < period_bounds(period)[1]:
            raise Conflict(f"{period} is not over.")
        if (earlier := _earliest_open(connection, tenant, period)) is not None:
            raise Conflict(f"{earlier} has usage that is on no final invoice: finalize it first.")
        closing = insert(connection, periods_table).on_conflict_do_nothing()
        connection.execute(closing, {"tenant_id": tenant, "period": period, "closed_at": at})
        document = statement(self._store, connection, tenant, period)
        if document != invoice.document:
            raise Conflict(f"{invoice.number} would say something else by now: create and review it again.")
        number, text = next_number(connection, f"INV-{at:%Y}"), document.model_dump_json()
        row = {
            "number": number,
            "invoice_id": invoice.id,
            "tenant_id": tenant,
            "period": period,
            "document": text,
            "sha256": sha256_of(number, at, text),
            "issued_at": at,
        }
        connection.execute(finals_table.insert().values(row))
        _balance(connection, tenant, difference_nanos(document), number, "invoice", at)


def difference_nanos(document: InvoiceDocument) -> int:
    """What the account owes for the month beyond what was charged when it was used."""
    return document.subtotal_nanos + document.tax_nanos - document.list_nanos


def _balance(
    connection: sa.Connection, tenant: str, nanos: int, reference: str, reason: str, at: datetime
) -> None:
    if nanos:
        kind = "charge" if nanos > 0 else "refund"
        transfer(connection, tenant, kind, abs(nanos), reference=reference, reason=reason, at=at)


def _receive(connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
    due = invoice.document.payable_nanos - credited_nanos(connection, invoice.number)
    if due > 0:
        transfer(
            connection,
            invoice.document.tenant,
            "payment",
            due,
            reference=f"{invoice.number}:payment",
            reason="invoice paid",
            at=change.at,
        )


def _reverse(connection: sa.Connection, invoice: Invoice, change: StateChange) -> None:
    if credited_nanos(connection, invoice.number):
        raise Conflict(f"{invoice.number} has credit notes: correct it by more of them.")
    nanos = -difference_nanos(invoice.document)
    reference = f"{invoice.number}:void"
    _balance(connection, invoice.document.tenant, nanos, reference, "invoice void", change.at)


def _earliest_open(connection: sa.Connection, tenant: str, period: str) -> str | None:
    """The first month before `period` with something to bill and no final invoice."""
    final = list(live_finals(connection, tenant))
    found = []
    for table in (hours_table, charges_table):
        c = table.c
        first = sa.select(sa.func.min(c.period))
        where = (c.tenant_id == tenant, c.period < period, c.period.not_in(final))
        found.append(connection.execute(first.where(*where)).scalar())
    return min((month for month in found if month is not None), default=None)


def _named(state: InvoiceState) -> str:
    return {InvoiceState.REVIEW: "in review", InvoiceState.DRAFT: "a draft"}.get(state, state.value)
