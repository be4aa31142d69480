"""`bespoke invoice`: a month of one tenant, from draft to paid."""

from pathlib import Path
from typing import Annotated

import typer

from serve.billing.invoicing.credit_notes import CreditNotes
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.periods import period_name
from serve.billing.invoicing.store import Invoice, InvoiceState
from serve.billing.money import exact, labelled, rounded
from serve.commands.billing_details import profile, seller
from serve.commands.common import (
    HomeOption,
    InvoiceArgument,
    JsonOption,
    console,
    now,
    open_store,
    print_json,
    print_list,
    settings_of,
)
from serve.commands.credit_note import credit_note
from serve.commands.invoice_files import Format, write
from serve.commands.invoice_lines import lines
from serve.commands.tables import Table
from serve.errors import OperatorError
from serve.tenants.audit import command_actor

app = typer.Typer(no_args_is_help=True)

ReasonOption = Annotated[str, typer.Option(help="Kept in the invoice's history.")]


@app.command()
def create(
    tenant: str,
    month: Annotated[str | None, typer.Option(help="Such as 2026-11; default: this month.")] = None,
    home: HomeOption = None,
) -> None:
    """Create the invoice of a month. To repeat it with the same usage gives the same invoice."""
    settings = settings_of(home)
    at = now()
    invoices = Invoices(open_store(settings))
    invoice = invoices.create(tenant, month or f"{at:%Y-%m}", at=at, actor=command_actor())
    paths = [write(settings, invoice, form) for form in (Format.PDF, Format.CSV)]
    _print_invoice(invoice)
    for path in paths:
        console.print(f"  {path}", markup=False)


@app.command("list")
def index(
    tenant: Annotated[str | None, typer.Argument()] = None,
    month: Annotated[str | None, typer.Option(help="Only this month, such as 2026-11.")] = None,
    state: Annotated[InvoiceState | None, typer.Option(help="Only invoices in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many at most.")] = 50,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List invoices, newest first."""
    states = tuple(InvoiceState) if state is None else (state,)
    invoices = Invoices(open_store(settings_of(home)))
    page = invoices.page(tenant=tenant, period=month, states=states, limit=limit)
    if as_json:
        from serve.api.admin.invoices import wire

        return print_list(page, wire)
    rows = Table("number", "tenant", "month", "state", ">total", ">due", "currency")
    for invoice in page.items:
        document = invoice.document
        amounts = (
            exact(document.total_nanos, document.currency),
            rounded(document.payable_nanos, document.currency),
            document.currency,
        )
        rows.add_row(invoice.number, document.tenant, document.period, invoice.state.value, *amounts)
    console.print(rows)
    if page.has_more:
        console.print(f"there are more than {limit}")


@app.command()
def show(number: InvoiceArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show an invoice, its history and its credit notes."""
    store = open_store(settings_of(home))
    invoices = Invoices(store)
    invoice, notes = invoices.get(number), CreditNotes(store).for_invoice(number)
    if as_json:
        from serve.commands.wire import invoice_and_credit_notes

        return print_json(invoice_and_credit_notes(invoices, invoice, notes))
    _print_invoice(invoice)
    rows = Table("state", "at", "by", "reason")
    for change in invoices.history(number):
        rows.add_row(change.state.value, f"{change.at:%Y-%m-%d %H:%M} UTC", change.actor, change.reason)
    console.print(rows)
    for note in notes:
        document = note.document
        amount = labelled(document.amount_nanos, document.currency)
        console.print(f"  {note.number}: {amount}, {document.reason}", markup=False)


app.command()(lines)


@app.command()
def review(number: InvoiceArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Submit a draft for review. Only an invoice in review can become final."""
    _print_state(_invoices(home).review(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def reopen(number: InvoiceArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Turn an invoice in review back into a draft."""
    _print_state(_invoices(home).reopen(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def finalize(number: InvoiceArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Freeze a reviewed invoice, number it and close its month. Only credit notes correct it then."""
    settings = settings_of(home)
    store = open_store(settings)
    invoice = Invoices(store).finalize(number, at=now(), actor=command_actor(), reason=reason)
    _print_state(invoice)
    if invoice.document.seller is None:
        console.print("its seller's details are not set: see `bespoke invoice seller`", style="yellow")
    for form in Format:
        console.print(f"  {write(settings, invoice, form)}", markup=False)


@app.command()
def pay(number: InvoiceArgument, reason: ReasonOption = "", home: HomeOption = None) -> None:
    """Record that an invoice has been paid, and post the amount to the tenant's account."""
    _print_state(_invoices(home).pay(number, at=now(), actor=command_actor(), reason=reason))


@app.command()
def void(
    number: InvoiceArgument,
    reason: Annotated[str, typer.Option(help="Required; kept in the invoice's history.", prompt=True)],
    home: HomeOption = None,
) -> None:
    """Void a final, unpaid invoice. `create` then makes a new draft of its month."""
    _print_state(_invoices(home).void(number, at=now(), actor=command_actor(), reason=reason))


app.command("credit-note")(credit_note)


@app.command()
def export(
    number: InvoiceArgument,
    form: Annotated[Format, typer.Option("--format")] = Format.PDF,
    home: HomeOption = None,
) -> None:
    """Write an invoice to its tenant's folder."""
    settings = settings_of(home)
    invoice = Invoices(open_store(settings)).get(number)
    console.print(str(write(settings, invoice, form)), markup=False)


@app.command()
def verify(number: InvoiceArgument, home: HomeOption = None) -> None:
    """Compute a final invoice again and compare it with the frozen one; exit 1 if they differ."""
    invoices = _invoices(home)
    if invoices.recalculate(number) != invoices.get(number).document:
        raise OperatorError(f"{number} differs from the invoice that is computed again.")
    console.print(f"{number} computed again is the same, to the nano", style="green")


app.command()(seller)
app.command()(profile)


def _invoices(home: Path | None) -> Invoices:
    return Invoices(open_store(settings_of(home)))


def _print_state(invoice: Invoice) -> None:
    console.print(f"[bold]{invoice.number}[/] is {invoice.state.value}")


def _print_invoice(invoice: Invoice) -> None:
    console.print(_table(invoice))
    for sentence in invoice.document.counting:
        console.print(f"  {sentence}", markup=False)


def _table(invoice: Invoice) -> Table:
    document = invoice.document
    state = invoice.state.value + (": the month is not over" if invoice.is_partial else "")
    title = f"Invoice {invoice.number}, {period_name(document.period)} ({state})"
    rows = Table("line", "!price", ">requests", "item", ">quantity", f">{document.currency}", title=title)
    for position, line in enumerate(document.lines, 1):
        first = (f"{position}. {line.label}", line.price, f"{line.requests:,}" if line.requests else "")
        for number, item in enumerate(line.items):
            last = number == len(line.items) - 1
            amount = exact(line.amount_nanos, document.currency) if last else ""
            what = f"{item.what} ({item.note})" if item.note else item.what
            rows.add_row(*(first if number == 0 else ("", "", "")), what, f"{item.quantity:,}", amount)
    for credit in document.credits:
        rows.add_row(f"{credit.kind} credit", "", "", "", "", exact(-credit.amount_nanos, document.currency))
    if document.tax is not None:
        rows.add_row(
            f"{document.tax.name} {document.tax.percent}%",
            *[""] * 4,
            exact(document.tax.amount_nanos, document.currency),
        )
    rows.add_row("total, exact", *[""] * 4, exact(document.total_nanos, document.currency))
    rows.add_row("amount due", *[""] * 4, rounded(document.payable_nanos, document.currency), style="bold")
    return rows
