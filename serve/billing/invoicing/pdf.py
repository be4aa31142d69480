"""Renders invoices and credit notes as PDF.

The fonts built into every PDF reader have only Latin letters. A document with other letters carries the
letters that it needs of Noto's fonts (`typefaces`). Letters that no font has are refused before a document
is final (`require_printable`).
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

from fpdf.enums import TableBordersLayout
from fpdf.fonts import FontFace
from pydantic import BaseModel

from serve.billing.invoicing.credit_notes import CreditNote
from serve.billing.invoicing.document import InvoiceDocument, InvoiceLine, LineItem, Party
from serve.billing.invoicing.periods import period_bounds, period_name
from serve.billing.invoicing.printable import fields_of, require_printable
from serve.billing.invoicing.store import Invoice, InvoiceState
from serve.billing.invoicing.text_layout import TextSheet
from serve.billing.invoicing.typefaces import is_plain
from serve.billing.money import digits, exact, rounded

INK, MUTED, RULE = (25, 28, 36), (105, 112, 125), (214, 218, 226)
NO_SELLER = Party(name="Bespoke", address="(the seller's details are not set)")
LEFT, RIGHT, WIDTH = 18, 192, 174


class _Sheet(TextSheet):
    """Lays out A4 pages with a footer on each."""

    def __init__(self, title: str, made_at: datetime, text: str) -> None:
        super().__init__(text)
        self._title = title
        self.set_title(title)
        self.set_creator("Bespoke")
        self.set_creation_date(made_at)
        self.set_margins(LEFT, 18, LEFT)
        self.set_auto_page_break(True, margin=24)
        self.add_page()

    def footer(self) -> None:
        self.set_y(-16)
        self.ink(8, muted=True)
        self.cell(WIDTH / 2, 5, self._title)
        self.cell(WIDTH / 2, 5, f"Page {self.page_no()} of {self.str_alias_nb_pages}", align="R")

    def ink(self, size: float, *, bold: bool = False, muted: bool = False) -> None:
        self.set_font(self.family, "B" if bold else "", size)
        color = MUTED if muted else INK
        self.set_text_color(*color)
        self.set_draw_color(*(color if bold else RULE))  # letters without a bold font are drawn around

    def line_of(self, name: str, value: str, *, bold: bool = False) -> None:
        """Print a sum at the right-hand side."""
        self.ink(11 if bold else 9.5, bold=bold)
        self.cell(140, 6.5, name, align="R")
        self.cell(0, 6.5, value, align="R", new_x="LMARGIN", new_y="NEXT")


def write_pdf(invoice: Invoice, path: Path) -> None:
    path.write_bytes(pdf_bytes(invoice))


def pdf_bytes(invoice: Invoice) -> bytes:
    """Returns the invoice's PDF. Raises Conflict for a draft with letters that no font has."""
    document = invoice.document
    require_printable(document, invoice.number)
    sheet = _Sheet(f"Invoice {invoice.number}", invoice.issued_at or invoice.created_at, _text(document))
    _head(sheet, _kind(invoice), document.seller)
    start, end = period_bounds(document.period)
    _facts(
        sheet,
        document,
        [
            ("Invoice number", invoice.number),
            ("Date of issue", f"{(invoice.issued_at or invoice.created_at):%Y-%m-%d}"),
            ("Billing period", period_name(document.period)),
            ("", f"{start:%Y-%m-%d} to {end - timedelta(days=1):%Y-%m-%d} (UTC)"),
            ("Price plan", document.plan or "none"),
            ("Currency", document.currency),
        ],
    )
    _line_items(sheet, document)
    _totals(sheet, document)
    _remarks(sheet, invoice)
    return sheet.pdf()


def note_pdf_bytes(note: CreditNote, invoice: Invoice) -> bytes:
    """Returns the PDF of the credit note `note` of `invoice`."""
    document, currency = note.document, note.document.currency
    text = _text(document, invoice.document)
    sheet = _Sheet(f"Credit note {note.number}", note.issued_at, text)
    _head(sheet, "CREDIT NOTE", invoice.document.seller)
    _facts(
        sheet,
        invoice.document,
        [
            ("Credit note", note.number),
            ("Date of issue", f"{note.issued_at:%Y-%m-%d}"),
            ("For invoice", document.invoice),
            ("Reason", document.reason),
        ],
    )
    rows = [
        [f"Line {line.line}: {line.text}" if line.line else "Amount", exact(line.amount_nanos, currency)]
        for line in document.lines
    ]
    _table(sheet, ("Credited", f"Amount {currency}"), (130, 44), ("LEFT", "RIGHT"), rows)
    sheet.ln(4)
    if document.tax_nanos and invoice.document.tax:
        tax = invoice.document.tax
        label = f"of which {_isolated(tax.name)} {tax.percent}%"
        sheet.line_of(label, exact(document.tax_nanos, document.currency))
    sheet.line_of(f"Credited, {currency}", exact(document.amount_nanos, document.currency), bold=True)
    _fingerprint(sheet, note.sha256)
    return sheet.pdf()


def _text(*documents: BaseModel) -> str:
    """Returns every text of the documents, each on a line of its own."""
    return "\n".join(text for document in documents for _, text in fields_of(document))


def _isolated(text: str) -> str:
    """Lets an English line with somebody's words run from the left, whatever direction those have."""
    return text if is_plain(text) else f"\u200e{text}\u200e"


def _kind(invoice: Invoice) -> str:
    if invoice.state == InvoiceState.VOID:
        return "INVOICE (VOID)"
    return "INVOICE" if invoice.final_number else f"INVOICE ({invoice.state.value.upper()})"


def _head(sheet: _Sheet, kind: str, seller: Party | None) -> None:
    seller = seller or NO_SELLER
    sheet.ink(12)
    sheet.cell(0, 9, kind, align="R", new_x="LMARGIN")
    sheet.ink(18, bold=True)
    sheet.multi_cell(116, 9, seller.name, align="L", new_x="LMARGIN", new_y="NEXT")
    sheet.ink(8.5, muted=True)
    sheet.multi_cell(110, 4, _details(seller), align="L", new_x="LMARGIN", new_y="NEXT")
    sheet.set_draw_color(*RULE)
    sheet.line(LEFT, sheet.y + 3, RIGHT, sheet.y + 3)
    sheet.ln(8)


def _details(party: Party) -> str:
    lines = [party.address, f"Tax ID {party.tax_id}" if party.tax_id else "", party.email]
    return "\n".join(line for line in lines if line) or " "


def _facts(sheet: _Sheet, document: InvoiceDocument, facts: Sequence[tuple[str, str]]) -> None:
    """Print the buyer at the left and the facts at the right."""
    top, buyer = sheet.y, document.buyer
    sheet.ink(8.5, muted=True)
    sheet.cell(80, 5, "Billed to", new_x="LMARGIN", new_y="NEXT")
    sheet.ink(10, bold=True)
    name = buyer.name if buyer else document.tenant
    sheet.multi_cell(80, 5, name, align="L", new_x="LMARGIN", new_y="NEXT")
    sheet.ink(9)
    details = _details(buyer) if buyer else "(no billing details given)"
    sheet.multi_cell(80, 4.5, details, align="L", new_x="LMARGIN", new_y="NEXT")
    sheet.ink(8.5, muted=True)
    sheet.cell(80, 5, f"Customer {document.tenant}")
    bottom, sheet.y = sheet.y + 5, top
    for what, value in facts:
        sheet.set_x(104)
        sheet.ink(8.5, muted=True)
        sheet.cell(28, 5, what)
        sheet.ink(8.5)
        sheet.multi_cell(0, 5, value, align="L", new_x="LMARGIN", new_y="NEXT")
    sheet.y = max(bottom, sheet.y)
    sheet.ln(6)


def _line_items(sheet: _Sheet, document: InvoiceDocument) -> None:
    currency, rows = document.currency, []
    for number, line in enumerate(document.lines, 1):
        items = line.items or (LineItem(what="", quantity=0, nanos=0, per=1),)
        for position, item in enumerate(items):
            last = position == len(items) - 1
            what = _described(number, line) if position == 0 else ""
            rows.append([what, *_cells(item, currency), exact(line.amount_nanos, currency) if last else ""])
    if not rows:
        rows.append(["No usage in this period", "", "", "", exact(0, currency)])
    columns = ("Description", "Item", "Quantity", f"Price {currency}", f"Amount {currency}")
    aligned = ("LEFT", "LEFT", "RIGHT", "RIGHT", "RIGHT")
    _table(sheet, columns, (50, 46, 26, 26, 26), aligned, rows)


def _described(number: int, line: InvoiceLine) -> str:
    counts = {"usage": f", {line.requests:,} requests", "minimum": ""}.get(line.kind, f", {line.kind}")
    return f"{line.label}\nLine {number}, {line.price}{counts}"


def _cells(item: LineItem, currency: str) -> list[str]:
    per = {1_000_000: " / 1M", 1: ""}[item.per]
    what = f"{item.what}\n({item.note})" if item.note else item.what
    return [what, f"{item.quantity:,}", f"{exact(item.nanos, currency)}{per}"]


def _table(
    sheet: _Sheet,
    columns: Sequence[str],
    widths: Sequence[int],
    aligned: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> None:
    sheet.ink(8)
    with sheet.table(
        col_widths=tuple(widths),
        text_align=tuple(aligned),
        borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        headings_style=FontFace(emphasis="BOLD", color=MUTED),
        line_height=4.5,
        padding=1,
    ) as table:
        table.row(columns)
        for row in rows:
            table.row(row)


def _totals(sheet: _Sheet, document: InvoiceDocument) -> None:
    if sheet.will_page_break(60):
        sheet.add_page()
    sheet.ln(4)
    sheet.line_of("Subtotal", exact(document.subtotal_nanos, document.currency))
    if promoted := document.credited_nanos("promotional"):
        sheet.line_of("Promotional credit", exact(-promoted, document.currency))
    if document.tax is not None:
        tax = document.tax
        name = f"{_isolated(tax.name)} {tax.percent}% of {exact(tax.taxable_nanos, document.currency)}"
        sheet.line_of(name, exact(tax.amount_nanos, document.currency))
    sheet.line_of("Total", exact(document.total_nanos, document.currency))
    if prepaid := document.credited_nanos("prepaid"):
        sheet.line_of("Prepaid credit", exact(-prepaid, document.currency))
        sheet.line_of("Due, exact", exact(document.due_nanos, document.currency))
    sheet.line_of(
        f"Amount due, {document.currency}", rounded(document.payable_nanos, document.currency), bold=True
    )


def _remarks(sheet: _Sheet, invoice: Invoice) -> None:
    document = invoice.document
    if sheet.will_page_break(36):
        sheet.add_page()
    sheet.ln(6)
    sheet.ink(8, muted=True)
    remarks = [
        "Token counts are those of the inference engine. Cached prompt tokens are part of the prompt that "
        "was served from your own prefix cache. A request that was broken off is billed for what had been "
        "generated. Amounts are exact; only the amount due is rounded, half to even, to "
        f"{digits(document.currency)} decimals."
    ]
    remarks += document.counting
    if late := sorted({line.late for line in document.lines if line.late}):
        months = ", ".join(period_name(month) for month in late)
        remarks.append(f"Late usage of {months}: it was settled after the invoice of its month was final.")
    if document.seller and document.seller.payment:
        remarks.append(f"Payment: {document.seller.payment}")
    if invoice.is_partial:
        remarks.append("This month is not over: the invoice can still change.")
    for remark in remarks:
        sheet.multi_cell(0, 4, remark, align="L", new_x="LMARGIN", new_y="NEXT")
        sheet.ln(1.5)
    if invoice.sha256:
        _fingerprint(sheet, invoice.sha256)


def _fingerprint(sheet: _Sheet, sha256: str) -> None:
    sheet.ln(2)
    sheet.ink(7, muted=True)
    sheet.multi_cell(0, 4, f"SHA-256 of the document: {sha256}", align="L")
