"""/admin/v1/invoices: draft to paid, the usage behind their lines, files, credit notes, billing details."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, Field, StringConstraints

from serve.api.admin.access import AdminCaller
from serve.api.admin.access import router as admin_router
from serve.api.dependencies import Ctx
from serve.api.pagination import (
    After,
    Body,
    Identified,
    Limit,
    Listing,
    PlainName,
    listing,
    maybe_seconds,
    now,
    seconds,
)
from serve.billing.invoicing.billing_details import SELLER, BillingDetails
from serve.billing.invoicing.breakdown import InvoiceFilter, InvoiceUsage, UsageRequest, UsageSum
from serve.billing.invoicing.credit_notes import LINES_MAX, CreditNote, CreditNotes
from serve.billing.invoicing.document import InvoiceDocument, Party
from serve.billing.invoicing.export import invoice_csv, json_text
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.pdf import pdf_bytes
from serve.billing.invoicing.store import Invoice, InvoiceState, StateChange
from serve.errors import InvalidRequest
from serve.storage.pagination import Page

router: APIRouter = admin_router("invoices")

Month = Annotated[str, StringConstraints(pattern="^20[0-9]{2}-(0[1-9]|1[0-2])$")]
Reason = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=200)]
Position = Annotated[int, Field(ge=1, le=100_000)]


class NewInvoice(Body):
    tenant: PlainName
    period: Month = Field(description="The month, as 2026-11.")


class Transition(Body):
    state: Literal["draft", "review", "finalized", "paid", "void"]
    reason: Reason = Field("", description="It is kept in the invoice's history.")


class NoteAmount(Body):
    line: Position | None = Field(None, description="The invoice's line, from 1.")
    amount_nanos: int = Field(ge=1, le=10**18, description="Gross.")


class NewCreditNote(Body):
    reason: Annotated[Reason, StringConstraints(min_length=1)]
    lines: list[NoteAmount] = Field(min_length=1, max_length=LINES_MAX)


class ChangeWire(BaseModel):
    state: str
    actor: str
    reason: str
    at: int


class InvoiceWire(Identified):
    """Amounts in nanos of `currency`; only what is payable is rounded, to its smallest unit."""

    object: Literal["invoice"] = "invoice"
    draft_id: str
    tenant: str
    period: str
    currency: str
    state: str
    created_at: int
    issued_at: int | None
    sha256: str | None
    subtotal_nanos: int
    tax_nanos: int
    total_nanos: int
    due_nanos: int
    payable_nanos: int


class WholeInvoiceWire(InvoiceWire):
    document: InvoiceDocument
    history: list[ChangeWire]


class CreditNoteWire(Identified):
    object: Literal["credit_note"] = "credit_note"
    invoice: str
    reason: str
    currency: str
    amount_nanos: int
    tax_nanos: int
    lines: list[NoteAmount]
    issued_at: int
    sha256: str


class InvoiceSumWire(Identified):
    """The sums of one day or one key, at the list price that was charged."""

    object: Literal["invoice.sum"] = "invoice.sum"
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanos: int


class InvoiceRequestWire(Identified):
    object: Literal["invoice.request"] = "invoice.request"
    at: int
    key: str
    model: str
    tier: str
    price: str = Field(description="The price version that it was charged at.")
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanos: int
    status: str


class PartyWire(BaseModel):
    object: Literal["billing_details"] = "billing_details"
    details: Party | None


@router.post("/invoices", status_code=201)
def create(body: NewInvoice, caller: AdminCaller, ctx: Ctx) -> WholeInvoiceWire:
    """Create or renew a month's draft. A final invoice stays as it is; a new revision needs new amounts."""
    invoices = Invoices(ctx.store)
    return whole_wire(invoices, invoices.create(body.tenant, body.period, at=now(), actor=caller.actor))


@router.get("/invoices")
def index(
    ctx: Ctx,
    after: After = None,
    limit: Limit = 20,
    tenant: PlainName | None = None,
    period: Month | None = None,
    state: InvoiceState | None = None,
) -> Listing[InvoiceWire]:
    """Newest first."""
    states = tuple(InvoiceState) if state is None else (state,)
    page = Invoices(ctx.store).page(tenant=tenant, period=period, states=states, after=after, limit=limit)
    return listing(page, wire)


@router.get("/invoices/{invoice}")
def show(invoice: str, ctx: Ctx) -> WholeInvoiceWire:
    invoices = Invoices(ctx.store)
    return whole_wire(invoices, invoices.get(invoice))


@router.post("/invoices/{invoice}/transition")
def transition(invoice: str, body: Transition, caller: AdminCaller, ctx: Ctx) -> WholeInvoiceWire:
    """draft → review → finalized → paid, or void; from review back to draft."""
    invoices = Invoices(ctx.store)
    moves = {
        "draft": invoices.reopen,
        "review": invoices.review,
        "finalized": invoices.finalize,
        "paid": invoices.pay,
        "void": invoices.void,
    }
    return whole_wire(invoices, moves[body.state](invoice, at=now(), actor=caller.actor, reason=body.reason))


@router.get("/invoices/{invoice}/usage")
def usage(
    invoice: str,
    ctx: Ctx,
    by: Annotated[Literal["day", "key"], Query(description="What to sum up.")] = "day",
    line: Annotated[int | None, Query(ge=1, le=100_000, description="Only this line, from 1.")] = None,
    day: Annotated[str | None, Query(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")] = None,
    key: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None,
    after: After = None,
    limit: Limit = 100,
) -> Listing[InvoiceSumWire]:
    """Sums by day or by key, of the invoice or of one of its lines."""
    groups = InvoiceUsage(ctx.store).sums(_get(ctx, invoice), by, within(line, day, key))
    rest = [group for group in groups if after is None or group.group > after]
    return listing(Page(rest[:limit], len(rest) > limit), sum_wire)


@router.get("/invoices/{invoice}/requests")
def requests(
    invoice: str,
    ctx: Ctx,
    line: Annotated[int | None, Query(ge=1, le=100_000, description="Only this line, from 1.")] = None,
    day: Annotated[str | None, Query(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")] = None,
    key: Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = None,
    after: After = None,
    limit: Limit = 20,
) -> Listing[InvoiceRequestWire]:
    """The requests of the invoice, a line, a day or a key, oldest first. A line of charges has charges."""
    selection = within(line, day, key)
    page = InvoiceUsage(ctx.store).requests(_get(ctx, invoice), selection, after=after, limit=limit)
    return listing(page, request_wire)


@router.get("/invoices/{invoice}/file", response_class=Response, responses={200: {"content": {"*/*": {}}}})
async def file(
    invoice: str, ctx: Ctx, format: Annotated[Literal["csv", "json", "pdf"], Query()] = "pdf"
) -> Response:
    """The invoice as CSV, JSON or PDF."""
    record = await asyncio.to_thread(_get, ctx, invoice)
    return await asyncio.to_thread(file_of, record, format)


@router.post("/invoices/{invoice}/credit-notes", status_code=201)
def credit(invoice: str, body: NewCreditNote, caller: AdminCaller, ctx: Ctx) -> CreditNoteWire:
    """Credit part or all of a final invoice. All notes together never exceed its total."""
    amounts = [(line.line, line.amount_nanos) for line in body.lines]
    note = CreditNotes(ctx.store).issue(invoice, amounts, reason=body.reason, at=now(), actor=caller.actor)
    return note_wire(note)


@router.get("/invoices/{invoice}/credit-notes")
def credit_notes(invoice: str, ctx: Ctx) -> Listing[CreditNoteWire]:
    return listing(Page(CreditNotes(ctx.store).for_invoice(invoice), False), note_wire)


@router.put("/seller")
def put_seller(body: Party, caller: AdminCaller, ctx: Ctx) -> PartyWire:
    """Set the seller on documents from now on."""
    BillingDetails(ctx.store).put(SELLER, body, actor=caller.actor)
    return PartyWire(details=body)


@router.get("/seller")
def get_seller(ctx: Ctx) -> PartyWire:
    return PartyWire(details=BillingDetails(ctx.store).get(SELLER))


@router.put("/tenants/{tenant}/billing-details")
def put_buyer(tenant: str, body: Party, caller: AdminCaller, ctx: Ctx) -> PartyWire:
    """Set the tenant's billing details on documents from now on."""
    BillingDetails(ctx.store).put(tenant, body, actor=caller.actor)
    return PartyWire(details=body)


@router.get("/tenants/{tenant}/billing-details")
def get_buyer(tenant: str, ctx: Ctx) -> PartyWire:
    ctx.tenants.get(tenant)
    return PartyWire(details=BillingDetails(ctx.store).get(tenant))


def within(line: int | None, day: str | None, key: str | None) -> InvoiceFilter:
    """The selection of an invoice's usage. Raises InvalidRequest if `day` is not a date."""
    try:
        midnight = None if day is None else datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidRequest(f"'{day}' is not a day.", "day", "invalid_value") from None
    return InvoiceFilter(line, midnight, key)


def file_of(invoice: Invoice, format: str) -> Response:
    """The invoice as "csv", "json" or "pdf"; the browser saves it under its number."""
    name = {"content-disposition": f'attachment; filename="{invoice.number}.{format}"'}
    if format == "csv":
        return Response(invoice_csv(invoice), media_type="text/csv; charset=utf-8", headers=name)
    if format == "json":
        return Response(json_text(invoice), media_type="application/json", headers=name)
    return Response(pdf_bytes(invoice), media_type="application/pdf", headers=name)


def wire(invoice: Invoice) -> InvoiceWire:
    return InvoiceWire.model_validate(_fields(invoice))


def note_wire(note: CreditNote) -> CreditNoteWire:
    document = note.document
    return CreditNoteWire(
        id=note.number,
        invoice=document.invoice,
        reason=document.reason,
        currency=document.currency,
        amount_nanos=document.amount_nanos,
        tax_nanos=document.tax_nanos,
        lines=[NoteAmount(line=line.line, amount_nanos=line.amount_nanos) for line in document.lines],
        issued_at=seconds(note.issued_at),
        sha256=note.sha256,
    )


def sum_wire(group: UsageSum) -> InvoiceSumWire:
    return InvoiceSumWire(
        id=group.group,
        requests=group.requests,
        prompt_tokens=group.prompt_tokens,
        cached_tokens=group.cached_tokens,
        completion_tokens=group.completion_tokens,
        cost_nanos=group.cost_nanos,
    )


def request_wire(request: UsageRequest) -> InvoiceRequestWire:
    return InvoiceRequestWire(
        id=request.id,
        at=seconds(request.at),
        key=request.key_id,
        model=request.model,
        tier=request.tier,
        price=request.price,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=request.cached_tokens,
        completion_tokens=request.completion_tokens,
        cost_nanos=request.cost_nanos,
        status=request.status,
    )


def _get(ctx: Ctx, number: str) -> Invoice:
    return Invoices(ctx.store).get(number)


def whole_wire(invoices: Invoices, invoice: Invoice) -> WholeInvoiceWire:
    history = [_change(change) for change in invoices.history(invoice.draft_number)]
    return WholeInvoiceWire.model_validate(
        _fields(invoice) | {"document": invoice.document, "history": history}
    )


def _fields(invoice: Invoice) -> dict[str, object]:
    document = invoice.document
    return {
        "id": invoice.number,
        "draft_id": invoice.draft_number,
        "tenant": document.tenant,
        "period": document.period,
        "currency": document.currency,
        "state": invoice.state.value,
        "created_at": seconds(invoice.created_at),
        "issued_at": maybe_seconds(invoice.issued_at),
        "sha256": invoice.sha256,
        "subtotal_nanos": document.subtotal_nanos,
        "tax_nanos": document.tax_nanos,
        "total_nanos": document.total_nanos,
        "due_nanos": document.due_nanos,
        "payable_nanos": document.payable_nanos,
    }


def _change(change: StateChange) -> ChangeWire:
    return ChangeWire(
        state=change.state.value, actor=change.actor, reason=change.reason, at=seconds(change.at)
    )
