"""`bespoke invoice lines`: the days, keys and requests behind an invoice's lines."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated

import typer

from serve.billing.invoicing.breakdown import By, InvoiceFilter, InvoiceUsage
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.store import Invoice
from serve.billing.money import exact
from serve.commands.common import (
    HomeOption,
    InvoiceArgument,
    JsonOption,
    console,
    open_store,
    print_list,
    settings_of,
)
from serve.commands.tables import Table


class Grouping(StrEnum):
    DAY = "day"
    KEY = "key"
    REQUEST = "request"


def lines(
    number: InvoiceArgument,
    by: Annotated[Grouping, typer.Option(help="Sums by day or by key, or each request.")] = Grouping.DAY,
    line: Annotated[int | None, typer.Option(min=1, help="Only this line, from 1.")] = None,
    day: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only this day (UTC).")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key, by its id.")] = None,
    after: Annotated[str | None, typer.Option(help="Only requests behind the one of this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many requests at most.")] = 100,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List what is behind an invoice's lines: sums at list price, or requests with their price versions."""
    store = open_store(settings_of(home))
    invoice, usage = Invoices(store).get(number), InvoiceUsage(store)
    within = InvoiceFilter(line, day.replace(tzinfo=UTC) if day else None, key)
    if by == Grouping.REQUEST:
        _print_requests(invoice, usage, within, after, limit, as_json)
    else:
        _print_sums(invoice, usage, within, "day" if by == Grouping.DAY else "key", as_json)


def _print_sums(invoice: Invoice, usage: InvoiceUsage, within: InvoiceFilter, by: By, as_json: bool) -> None:
    sums = usage.sums(invoice, by, within)
    if as_json:
        from serve.api.admin.invoices import sum_wire

        return print_list(sums, sum_wire)
    rows = Table(by, ">requests", *_counted(invoice))
    for group in sums:
        counts = (group.requests, group.prompt_tokens, group.cached_tokens, group.completion_tokens)
        rows.add_row(
            group.group,
            *(f"{count:,}" for count in counts),
            exact(group.cost_nanos, invoice.document.currency),
        )
    console.print(rows)


def _print_requests(
    invoice: Invoice, usage: InvoiceUsage, within: InvoiceFilter, after: str | None, limit: int, as_json: bool
) -> None:
    page = usage.requests(invoice, within, after=after, limit=limit)
    if as_json:
        from serve.api.admin.invoices import request_wire

        return print_list(page, request_wire)
    rows = Table("request", "at", "key", "model", "!price", *_counted(invoice), "status")
    for request in page.items:
        tokens = (request.prompt_tokens, request.cached_tokens, request.completion_tokens)
        names = (request.id, f"{request.at:%Y-%m-%d %H:%M:%S}", request.key_id, request.model, request.price)
        counts = (f"{count:,}" for count in tokens)
        rows.add_row(*names, *counts, exact(request.cost_nanos, invoice.document.currency), request.status)
    console.print(rows)
    if page.has_more:
        console.print(f"there are more: --after {page.items[-1].id}")


def _counted(invoice: Invoice) -> tuple[str, ...]:
    return ">prompt", ">of it cached", ">completion", f">{invoice.document.currency}"
