"""JSON objects of commands that show more than one object of the API: the API's shape, with the rest in it.

Commands import this module only for `--json`: it loads the HTTP API.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime

from serve.api.admin.invoices import CreditNoteWire, WholeInvoiceWire, note_wire, whole_wire
from serve.api.admin.tenants import AccountWire, TenantWire, account_wire
from serve.api.admin.tenants import wire as tenant_wire
from serve.api.organization.usage import CompletionsResult
from serve.api.organization.usage import wire as usage_wire
from serve.api.organization.window import Page, TimeBucket
from serve.api.pagination import seconds
from serve.billing.invoicing.credit_notes import CreditNote
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.store import Invoice
from serve.billing.ledger.accounts import Account
from serve.billing.metering.queries import DAY, UsageBucket
from serve.billing.money import DEFAULT_CURRENCY
from serve.tenants import Tenant


class TenantAndAccount(TenantWire):
    account: AccountWire | None


class InvoiceAndCreditNotes(WholeInvoiceWire):
    credit_notes: list[CreditNoteWire]


class UsageResult(CompletionsResult):
    cost_nanos: int
    currency: str


def tenant_and_account(tenant: Tenant, account: Account | None) -> TenantAndAccount:
    return TenantAndAccount(
        **dict(tenant_wire(tenant)), account=None if account is None else account_wire(tenant.id, account)
    )


def invoice_and_credit_notes(
    invoices: Invoices, invoice: Invoice, notes: Iterable[CreditNote]
) -> InvoiceAndCreditNotes:
    return InvoiceAndCreditNotes(
        **dict(whole_wire(invoices, invoice)), credit_notes=[note_wire(note) for note in notes]
    )


def usage_page(
    usage: Sequence[UsageBucket], span: tuple[datetime, datetime], *, by_day: bool
) -> Page[UsageResult]:
    """One bucket for the whole span, or one for each day on which anything was used."""
    start, end = span
    starts = sorted({bucket.bucket for bucket in usage}) if by_day else [start]
    buckets = [
        TimeBucket[UsageResult](
            start_time=seconds(at),
            end_time=seconds(at + DAY if by_day else end),
            results=[
                UsageResult(
                    **dict(usage_wire(bucket)),
                    cost_nanos=bucket.cost_nanos,
                    currency=bucket.currency or DEFAULT_CURRENCY,
                )
                for bucket in usage
                if bucket.bucket == at
            ],
        )
        for at in starts
    ]
    return Page[UsageResult](data=buckets, has_more=False, next_page=None)
