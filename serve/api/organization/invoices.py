"""GET /v1/organization/invoices: a tenant's issued invoices, the usage behind them, and their files.

Drafts are for the operator; the customer reads issued invoices: finalized, paid or void.
"""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from serve.api.admin.invoices import (
    CreditNoteWire,
    InvoiceRequestWire,
    InvoiceSumWire,
    InvoiceWire,
    file_of,
    note_wire,
    request_wire,
    sum_wire,
    wire,
    within,
)
from serve.api.dependencies import Ctx
from serve.api.organization.access import Reader, TenantName, tenant_of
from serve.api.organization.access import router as organization_router
from serve.api.pagination import After, Limit, Listing, listing
from serve.billing.invoicing.breakdown import InvoiceUsage
from serve.billing.invoicing.credit_notes import CreditNotes
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.store import FINAL, Invoice, InvoiceState
from serve.errors import UnknownRecord
from serve.storage.pagination import Page

router: APIRouter = organization_router()

ISSUED = (*FINAL, InvoiceState.VOID)
Line = Annotated[int | None, Query(ge=1, le=100_000, description="Only this line, from 1.")]
Day = Annotated[str | None, Query(pattern=r"^20[0-9]{2}-[0-9]{2}-[0-9]{2}$")]
Key = Annotated[str | None, Query(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


@router.get("/invoices")
def index(
    reader: Reader, ctx: Ctx, tenant: TenantName = None, after: After = None, limit: Limit = 20
) -> Listing[InvoiceWire]:
    """Newest first."""
    tenant = tenant_of(reader, tenant)
    return listing(Invoices(ctx.store).page(tenant=tenant, states=ISSUED, after=after, limit=limit), wire)


@router.get("/invoices/{invoice}")
def show(invoice: str, reader: Reader, ctx: Ctx, tenant: TenantName = None) -> InvoiceWire:
    return wire(_issued(ctx, invoice, tenant_of(reader, tenant)))


@router.get("/invoices/{invoice}/file", response_class=Response, responses={200: {"content": {"*/*": {}}}})
async def file(
    invoice: str,
    reader: Reader,
    ctx: Ctx,
    tenant: TenantName = None,
    format: Annotated[Literal["csv", "json", "pdf"], Query()] = "pdf",
) -> Response:
    record = await asyncio.to_thread(_issued, ctx, invoice, tenant_of(reader, tenant))
    return await asyncio.to_thread(file_of, record, format)


@router.get("/invoices/{invoice}/usage")
def usage(
    invoice: str,
    reader: Reader,
    ctx: Ctx,
    tenant: TenantName = None,
    by: Annotated[Literal["day", "key"], Query(description="What to sum up.")] = "day",
    line: Line = None,
    day: Day = None,
    key: Key = None,
    after: After = None,
    limit: Limit = 100,
) -> Listing[InvoiceSumWire]:
    """Sums by day or by key, of the invoice or of one of its lines."""
    record = _issued(ctx, invoice, tenant_of(reader, tenant))
    groups = InvoiceUsage(ctx.store).sums(record, by, within(line, day, key))
    rest = [group for group in groups if after is None or group.group > after]
    return listing(Page(rest[:limit], len(rest) > limit), sum_wire)


@router.get("/invoices/{invoice}/requests")
def requests(
    invoice: str,
    reader: Reader,
    ctx: Ctx,
    tenant: TenantName = None,
    line: Line = None,
    day: Day = None,
    key: Key = None,
    after: After = None,
    limit: Limit = 20,
) -> Listing[InvoiceRequestWire]:
    """The requests of the invoice, a line, a day or a key, oldest first. A line of charges has charges."""
    record = _issued(ctx, invoice, tenant_of(reader, tenant))
    page = InvoiceUsage(ctx.store).requests(record, within(line, day, key), after=after, limit=limit)
    return listing(page, request_wire)


@router.get("/invoices/{invoice}/credit-notes")
def credit_notes(
    invoice: str, reader: Reader, ctx: Ctx, tenant: TenantName = None
) -> Listing[CreditNoteWire]:
    record = _issued(ctx, invoice, tenant_of(reader, tenant))
    return listing(Page(CreditNotes(ctx.store).for_invoice(record.number), False), note_wire)


def _issued(ctx: Ctx, number: str, tenant: str | None) -> Invoice:
    """An issued invoice. Raises UnknownRecord, also for another tenant's invoice and for a draft."""
    record = Invoices(ctx.store).get(number, tenant=tenant)
    if record.state not in ISSUED:
        raise UnknownRecord(f"There is no invoice '{number[:100]}'.")
    return record
