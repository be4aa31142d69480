"""`bespoke invoice`: a month of one tenant, as a table, a CSV and a PDF."""

from typing import Annotated

import typer

from serve.billing.invoice import Invoice, Invoices, period_name
from serve.billing.invoice_files import write_csv, write_pdf
from serve.billing.money import cents, usd
from serve.commands.parts import HomeOption, console, now, open_store, settings_of, table

app = typer.Typer(no_args_is_help=True)


@app.callback()
def invoices() -> None:
    """Make invoices as table, CSV and PDF."""


@app.command()
def create(
    tenant: str,
    month: Annotated[str | None, typer.Option(help="As 2026-11; default: this month.")] = None,
    home: HomeOption = None,
) -> None:
    """Make the invoice of a month; again with the same usage it is the same invoice."""
    settings = settings_of(home)
    at = now()
    invoice = Invoices(open_store(settings)).create(tenant, month or f"{at:%Y-%m}", at=at)
    folder = settings.invoices_dir / tenant
    folder.mkdir(parents=True, exist_ok=True)
    csv_path, pdf_path = folder / f"{invoice.number}.csv", folder / f"{invoice.number}.pdf"
    write_csv(invoice, csv_path)
    write_pdf(invoice, pdf_path)
    show(invoice)
    console.print(f"  {pdf_path}\n  {csv_path}", highlight=False, soft_wrap=True)


def show(invoice: Invoice) -> None:
    document = invoice.document
    draft = " (draft: the month is not over)" if invoice.is_draft else ""
    title = f"Invoice {invoice.number}, {period_name(document.period)}{draft}"
    rows = table("model", "price", ">requests", ">prompt", ">cached", ">completion", ">USD", title=title)
    for line in document.lines:
        counts = (
            line.requests,
            line.uncached_prompt_tokens,
            line.cached_prompt_tokens,
            line.completion_tokens,
        )
        rows.add_row(line.label, line.price, *(f"{c:,}" for c in counts), usd(line.amount_nanos))
    rows.add_section()
    rows.add_row("total, exact", "", "", "", "", "", usd(document.total_nanos))
    rows.add_row("amount due", "", "", "", "", "", cents(document.total_nanos), style="bold")
    console.print(rows)
