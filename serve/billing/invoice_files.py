"""Invoices as files: CSV for spreadsheets, PDF for people."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from fpdf import FPDF
from fpdf.enums import TableBordersLayout
from fpdf.fonts import FontFace

from serve.billing.invoice import Invoice, InvoiceLine, period_bounds, period_name
from serve.billing.money import cents, usd

CSV_COLUMNS = (
    "invoice",
    "tenant",
    "period",
    "model",
    "price",
    "tier",
    "requests",
    "class",
    "tokens",
    "usd_per_million_tokens",
    "amount_usd",
)
INK, MUTED, RULE = (25, 28, 36), (105, 112, 125), (214, 218, 226)


def write_csv(invoice: Invoice, path: Path) -> None:
    """One row per line item and a total row; amounts exact, in USD."""
    document = invoice.document
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    head = [invoice.number, document.tenant, document.period]
    for line in document.lines:
        first, what = True, [line.model, line.price, line.tier]
        for name, tokens, rate in _classes(line):
            requests = line.requests if first else ""
            writer.writerow([*head, *what, requests, name, tokens, usd(rate), ""])
            first = False
        writer.writerow([*head, *what, "", "subtotal", "", "", usd(line.amount_nanos)])
    writer.writerow([*head, "", "", "", "", "total", "", "", usd(document.total_nanos)])
    path.write_text(out.getvalue(), encoding="utf-8")


def write_pdf(invoice: Invoice, path: Path) -> None:
    """An A4 invoice. Core PDF fonts: names are ASCII by construction (see NAME_PATTERN)."""
    document = invoice.document
    pdf = FPDF(format="A4", unit="mm")
    pdf.set_title(f"Invoice {invoice.number}")
    pdf.set_creator("Bespoke")
    pdf.set_creation_date(invoice.created_at)
    pdf.set_margins(18, 18, 18)
    pdf.add_page()
    _header(pdf, invoice)
    _line_items(pdf, invoice)
    _totals(pdf, invoice)
    pdf.set_y(-38)
    pdf.set_font("helvetica", size=8)
    pdf.set_text_color(*MUTED)
    pdf.multi_cell(
        0,
        4,
        "Token counts are those of the inference engine. Cached prompt tokens are part of the prompt that "
        "was served from your own prefix cache. A request that was broken off is billed for what had been "
        "generated. "
        f"Exact total: {usd(document.total_nanos)} {document.currency}.",
    )
    pdf.output(str(path))


def _header(pdf: FPDF, invoice: Invoice) -> None:
    document = invoice.document
    start, end = period_bounds(document.period)
    pdf.set_text_color(*INK)
    pdf.set_font("helvetica", "B", 22)
    pdf.cell(100, 10, "Bespoke")
    pdf.set_font("helvetica", size=12)
    pdf.cell(
        0, 10, "INVOICE (DRAFT)" if invoice.is_draft else "INVOICE", align="R", new_x="LMARGIN", new_y="NEXT"
    )
    pdf.set_draw_color(*RULE)
    pdf.line(18, pdf.y + 2, 192, pdf.y + 2)
    pdf.ln(8)
    facts = [
        ("Invoice number", invoice.number),
        ("Customer", document.tenant),
        (
            "Billing period",
            f"{period_name(document.period)} ({start:%Y-%m-%d} to {end:%Y-%m-%d}, UTC, end excluded)",
        ),
        ("Issued", f"{invoice.created_at:%Y-%m-%d %H:%M} UTC"),
        ("Currency", document.currency),
    ]
    for name, value in facts:
        pdf.set_font("helvetica", size=9)
        pdf.set_text_color(*MUTED)
        pdf.cell(38, 6, name)
        pdf.set_text_color(*INK)
        pdf.cell(0, 6, value, new_x="LMARGIN", new_y="NEXT")
    pdf.ln(6)


def _line_items(pdf: FPDF, invoice: Invoice) -> None:
    pdf.set_font("helvetica", size=9)
    style = FontFace(emphasis="BOLD", color=MUTED)
    with pdf.table(
        col_widths=(56, 50, 24, 28, 28),
        text_align=("LEFT", "LEFT", "RIGHT", "RIGHT", "RIGHT"),
        borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        headings_style=style,
        line_height=6,
        padding=1,
    ) as table:
        table.row(["Model", "Item", "Tokens", "USD / 1M", "Amount USD"])
        for line in invoice.document.lines:
            rows = list(_classes(line))
            for position, (name, tokens, rate) in enumerate(rows):
                first, last = position == 0, position == len(rows) - 1
                model = f"{line.label}\n{line.price}, {line.requests} requests" if first else ""
                table.row([model, name, f"{tokens:,}", usd(rate), usd(line.amount_nanos) if last else ""])
        if not invoice.document.lines:
            table.row(["No usage in this period", "", "", "", usd(0)])


def _totals(pdf: FPDF, invoice: Invoice) -> None:
    pdf.ln(4)
    pdf.set_font("helvetica", size=10)
    pdf.cell(146, 7, "Total, exact", align="R")
    pdf.cell(0, 7, usd(invoice.document.total_nanos), align="R", new_x="LMARGIN", new_y="NEXT")
    pdf.set_font("helvetica", "B", 12)
    pdf.cell(146, 8, f"Amount due, {invoice.document.currency}", align="R")
    pdf.cell(0, 8, cents(invoice.document.total_nanos), align="R", new_x="LMARGIN", new_y="NEXT")


def _classes(line: InvoiceLine) -> Iterator[tuple[str, int, int]]:
    """(name, tokens, nano-USD per million) of each token class."""
    yield "prompt tokens", line.uncached_prompt_tokens, line.prompt_nanos_per_mtok
    yield "prompt tokens, cached", line.cached_prompt_tokens, line.cached_prompt_nanos_per_mtok
    yield "completion tokens", line.completion_tokens, line.completion_nanos_per_mtok
