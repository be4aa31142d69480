"""`bespoke invoice`: a month of one tenant, from draft to paid; as a table, a CSV, a PDF and JSON."""

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
import yaml
from pydantic import ValidationError

from serve.billing.invoicing.billing_details import SELLER, BillingDetails, read_party
from serve.billing.invoicing.breakdown import By, InvoiceFilter, InvoiceUsage
from serve.billing.invoicing.credit_notes import CreditNotes
from serve.billing.invoicing.export import write_csv, write_json
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.pdf import note_pdf_bytes, write_pdf
from serve.billing.invoicing.periods import period_name
from serve.billing.invoicing.store import Invoice, InvoiceState
from serve.billing.money import cents, nanos_of_usd, usd
from serve.commands.common import HomeOption, console, now, open_store, settings_of, table
from serve.errors import OperatorError
from serve.settings import Settings
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

NumberArgument = Annotated[str, typer.Argument(help="INV-2026-000001, or a draft's: acme-2026-11-r1")]
ReasonOption = Annotated[str, typer.Option(help="Why; it is kept in the invoice's history.")]


class Format(StrEnum):
    CSV = "csv"
    PDF = "pdf"
    JSON = "json"


class Grouping(StrEnum):
    DAY = "day"
    KEY = "key"
    REQUEST = "request"


WRITERS = {Format.CSV: write_csv, Format.PDF: write_pdf, Format.JSON: write_json}


@app.command()
def create(
    tenant: str,
    month: Annotated[str | None, typer.Option(help="As 2026-11; default: this month.")] = None,
    home: HomeOption = None,
) -> None:
    """Make the invoice of a month; again with the same usage it is the same invoice."""
    settings = settings_of(home)
    at = now()
    invoices = Invoices(open_store(settings))
    invoice = invoices.create(tenant, month or f"{at:%Y-%m}", at=at, actor=command_actor())
    written = [_write(settings, invoice, form) for form in (Format.PDF, Format.CSV)]
    _show(invoice)
    console.print("".join(f"  {path}\n" for path in written), highlight=False, soft_wrap=True, end="")


@app.command("list")
def index(
    tenant: Annotated[str | None, typer.Argument()] = None,
    month: Annotated[str | None, typer.Option(help="As 2026-11.")] = None,
    state: Annotated[InvoiceState | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 50,
    home: HomeOption = None,
) -> None:
    """Invoices, newest first."""
    states = tuple(InvoiceState) if state is None else (state,)
    invoices = Invoices(open_store(settings_of(home)))
    found = invoices.page(tenant=tenant, period=month, states=states, limit=limit)
    rows = table("!number", "tenant", "month", "state", ">total", ">due", "currency")
    for invoice in found.items:
        document = invoice.document
        amounts = (usd(document.total_nanos), cents(document.payable_nanos), document.currency)
        rows.add_row(invoice.number, document.tenant, document.period, invoice.state.value, *amounts)
    console.print(rows)
    if found.has_more:
        console.print(f"there are more than {limit}")


@app.command()
def show(number: NumberArgument, home: HomeOption = None) -> None:
    """An invoice, its history and its credit notes."""
    store = open_store(settings_of(home))
    invoices = Invoices(store)
    _show(invoices.get(number))
    rows = table("state", "at", "by", "reason")
    for change in invoices.history(number):
        rows.add_row(change.state.value, f"{change.at:%Y-%m-%d %H:%M} UTC", change.actor, change.reason)
    console.print(rows)
    for note in CreditNotes(store).for_invoice(number):
        said = note.document
        console.print(
            f"  {note.number}: {usd(said.amount_nanos)} {said.currency}, {said.reason}", markup=False
        )


@app.command()
def lines(
    number: NumberArgument,
    by: Annotated[Grouping, typer.Option(help="What to sum up, or each request.")] = Grouping.DAY,
    line: Annotated[int | None, typer.Option(min=1, help="Only this line, from 1.")] = None,
    day: Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="Only this day (UTC).")] = None,
    key: Annotated[str | None, typer.Option(help="Only this key's id.")] = None,
    after: Annotated[str | None, typer.Option(help="Requests behind the one of this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 100,
    home: HomeOption = None,
) -> None:
    """What is behind an invoice's lines, at list price: days, keys, requests with their price versions."""
    store = open_store(settings_of(home))
    invoice, usage = Invoices(store).get(number), InvoiceUsage(store)
    within = InvoiceFilter(line, day.replace(tzinfo=UTC) if day else None, key)
    counted = (">prompt", ">of it cached", ">completion", f">{invoice.document.currency}")
    if by != Grouping.REQUEST:
        grouping: By = "day" if by == Grouping.DAY else "key"
        rows = table(f"!{by.value}", ">requests", *counted)
        for group in usage.sums(invoice, grouping, within):
            counts = (group.requests, group.prompt_tokens, group.cached_tokens, group.completion_tokens)
            rows.add_row(group.group, *(f"{count:,}" for count in counts), usd(group.cost_nanos))
        console.print(rows)
        return
    rows = table("!request", "at", "!key", "model", "price", *counted, "status")
    page = usage.requests(invoice, within, after=after, limit=limit)
    for one in page.items:
        tokens = (one.prompt_tokens, one.cached_tokens, one.completion_tokens)
        shown = [f"{count:,}" for count in tokens]
        at = f"{one.at:%Y-%m-%d %H:%M:%S}"
        rows.add_row(one.id, at, one.key_id, one.model, one.price, *shown, usd(one.cost_nanos), one.status)
    console.print(rows)
    if page.has_more:
        console.print(f"there are more: --after {page.items[-1].id}", highlight=False)


@app.command()
def review(number: NumberArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Say that a draft is to be looked at; only that can become final."""
    _said(_invoices(home).review(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def reopen(number: NumberArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Make what is in review a draft again."""
    _said(_invoices(home).reopen(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def finalize(number: NumberArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Freeze what was reviewed, number it and close its month. There is no way back but credit notes."""
    settings = settings_of(home)
    store = open_store(settings)
    invoice = Invoices(store).finalize(number, at=now(), actor=command_actor(), reason=reason)
    _said(invoice)
    if invoice.document.seller is None:
        console.print("its seller's details are not set: see `bespoke invoice seller`", style="yellow")
    for form in Format:
        console.print(f"  {_write(settings, invoice, form)}", highlight=False, soft_wrap=True)


@app.command()
def pay(number: NumberArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Say that what was due has been paid; it is posted to the tenant's account."""
    _said(_invoices(home).pay(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def void(
    number: NumberArgument,
    reason: Annotated[str, typer.Option(help="Why; required.", prompt=True)],
    home: HomeOption = None,
) -> None:
    """Take a final, unpaid invoice back as a whole; `create` then makes a new draft of its month."""
    _said(_invoices(home).void(number, at=now(), actor=command_actor(), reason=reason))


@app.command("credit-note")
def credit_note(
    number: NumberArgument,
    amount: Annotated[str, typer.Argument(help="Gross, such as 12.50.")],
    reason: Annotated[str, typer.Option(help="It is on the credit note.")],
    line: Annotated[int | None, typer.Option(min=1, help="Which line it is for, from 1.")] = None,
    home: HomeOption = None,
) -> None:
    """Give part of a final invoice back, or all of it."""
    settings = settings_of(home)
    store = open_store(settings)
    if not 1 <= len(reason) <= 200 or not reason.isprintable():
        raise OperatorError("A reason has 1 to 200 printable characters.")
    note = CreditNotes(store).issue(
        number, [(line, _nanos(amount))], reason=reason, at=now(), actor=command_actor()
    )
    invoice = Invoices(store).get(number)
    folder = _folder(settings, invoice)
    (folder / f"{note.number}.pdf").write_bytes(note_pdf_bytes(note, invoice))
    said = note.document
    console.print(
        f"[bold]{note.number}[/] credits {usd(said.amount_nanos)} {said.currency} of {said.invoice}"
    )
    console.print(f"  {folder / note.number}.pdf", highlight=False, soft_wrap=True)


@app.command()
def export(
    number: NumberArgument,
    form: Annotated[Format, typer.Option("--format")] = Format.PDF,
    home: HomeOption = None,
) -> None:
    """Write an invoice to its tenant's folder."""
    settings = settings_of(home)
    invoice = Invoices(open_store(settings)).get(number)
    console.print(str(_write(settings, invoice, form)), highlight=False, soft_wrap=True)


@app.command()
def verify(number: NumberArgument, home: HomeOption = None) -> None:
    """Compute a final invoice again, and compare it with what was frozen; exit 1 if it differs."""
    invoices = _invoices(home)
    if invoices.recalculate(number) != invoices.get(number).document:
        raise OperatorError(f"{number} computed again says something else.")
    console.print(f"{number} computed again is the same, to the nano", style="green")


@app.command()
def seller(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], home: HomeOption = None
) -> None:
    """Say who sells: a YAML with name, address, tax_id, email, payment (configs/seller.yaml)."""
    _party(SELLER, file, home)


@app.command()
def profile(
    tenant: str, file: Annotated[Path, typer.Argument(exists=True, dir_okay=False)], home: HomeOption = None
) -> None:
    """Say who the tenant is on its invoices: a YAML with name, address, tax_id, email."""
    _party(tenant, file, home)


def _party(party: str, file: Path, home: Path | None) -> None:
    try:
        details = read_party(file)
    except (ValidationError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise OperatorError(f"{file}: {error}") from None
    BillingDetails(open_store(settings_of(home))).put(party, details, actor=command_actor())
    console.print(f"invoices from now on say: {details.name}", markup=False)


def _invoices(home: Path | None) -> Invoices:
    return Invoices(open_store(settings_of(home)))


def _said(invoice: Invoice) -> None:
    console.print(f"[bold]{invoice.number}[/] is {invoice.state.value}", highlight=False)


def _folder(settings: Settings, invoice: Invoice) -> Path:
    folder = settings.invoices_dir / invoice.document.tenant
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _write(settings: Settings, invoice: Invoice, form: Format) -> Path:
    path = _folder(settings, invoice) / f"{invoice.number}.{form.value}"
    WRITERS[form](invoice, path)
    return path


def _nanos(amount: str) -> int:
    try:
        return nanos_of_usd(amount)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _show(invoice: Invoice) -> None:
    document = invoice.document
    state = invoice.state.value + (": the month is not over" if invoice.is_partial else "")
    title = f"Invoice {invoice.number}, {period_name(document.period)} ({state})"
    rows = table("", "price", ">requests", "item", ">quantity", f">{document.currency}", title=title)
    for position, line in enumerate(document.lines, 1):
        first = (f"{position}. {line.label}", line.price, f"{line.requests:,}" if line.requests else "")
        for number, item in enumerate(line.items):
            last = number == len(line.items) - 1
            amount = usd(line.amount_nanos) if last else ""
            rows.add_row(*(first if number == 0 else ("", "", "")), item.what, f"{item.quantity:,}", amount)
    rows.add_section()
    for credit in document.credits:
        rows.add_row(f"{credit.kind} credit", "", "", "", "", usd(-credit.amount_nanos))
    if document.tax is not None:
        rows.add_row(
            f"{document.tax.name} {document.tax.percent}%", *[""] * 4, usd(document.tax.amount_nanos)
        )
    rows.add_row("total, exact", *[""] * 4, usd(document.total_nanos))
    rows.add_row("amount due", *[""] * 4, cents(document.payable_nanos), style="bold")
    console.print(rows)
