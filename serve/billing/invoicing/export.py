"""Exports invoices for machines: CSV with one row per item, and JSON with the document itself."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve.billing.invoicing.document import InvoiceLine, LineItem
from serve.billing.invoicing.store import Invoice
from serve.billing.money import exact
from serve.billing.spreadsheet import csv_text

CSV_COLUMNS = (
    "invoice",
    "tenant",
    "period",
    "currency",
    "line",
    "kind",
    "model",
    "price",
    "tier",
    "late_usage_of",
    "requests",
    "class",
    "quantity",
    "included",
    "price_per_unit",
    "unit",
    "amount",
    "tiers_over",
    "counted_before",
    "counted_total",
)


def invoice_csv(invoice: Invoice) -> str:
    """Return one row per item, then the line's subtotal; credits, tax and totals at the end. All exact.

    The notes behind them say how tiers, minimum and included tokens were counted.
    """
    return csv_text(CSV_COLUMNS, _rows(invoice))


def _rows(invoice: Invoice) -> Iterator[dict[str, Any]]:
    document = invoice.document
    invoice_columns = {
        "invoice": invoice.number,
        "tenant": document.tenant,
        "period": document.period,
        "currency": document.currency,
    }
    for position, line in enumerate(document.lines, 1):
        line_columns = {
            "line": position,
            "kind": line.kind,
            "model": line.model,
            "price": line.price,
            "tier": line.tier,
            "late_usage_of": line.late or "",
        }
        for item in line.items:
            item_columns = {"class": item.what, "quantity": item.quantity, "included": item.included}
            price_columns = {"price_per_unit": exact(item.nanos, document.currency), "unit": item.per}
            yield invoice_columns | line_columns | item_columns | price_columns | _counted(line, item)
        requests = line.requests if line.kind == "usage" else ""
        subtotal = {
            "class": "subtotal",
            "requests": requests,
            "amount": exact(line.amount_nanos, document.currency),
        }
        yield invoice_columns | line_columns | subtotal
    for credit in document.credits:
        amount = exact(-credit.amount_nanos, document.currency)
        yield invoice_columns | {"kind": "credit", "class": credit.kind, "amount": amount}
    if document.tax is not None:
        tax = f"{document.tax.name} {document.tax.percent}%"
        yield invoice_columns | {
            "kind": "tax",
            "class": tax,
            "amount": exact(document.tax.amount_nanos, document.currency),
        }
    for name, nanos in (
        ("total", document.total_nanos),
        ("due", document.due_nanos),
        ("payable", document.payable_nanos),
    ):
        yield invoice_columns | {"class": name, "amount": exact(nanos, document.currency)}
    for sentence in document.counting:
        yield invoice_columns | {"kind": "note", "class": sentence}


def _counted(line: InvoiceLine, item: LineItem) -> dict[str, Any]:
    if item.counted is None:
        return {}
    counts = {"counted_before": item.counted.before, "counted_total": item.counted.total}
    return {"tiers_over": line.tiers_over} | counts


def summary(invoice: Invoice) -> dict[str, Any]:
    """Return the document and its identification as plain JSON values, amounts in nanos."""
    document = invoice.document
    return {
        "number": invoice.number,
        "draft_number": invoice.draft_number,
        "state": invoice.state.value,
        "created_at": invoice.created_at.isoformat(),
        "issued_at": invoice.issued_at.isoformat() if invoice.issued_at else None,
        "sha256": invoice.sha256,
        "document": document.model_dump(mode="json"),
        "subtotal_nanos": document.subtotal_nanos,
        "tax_nanos": document.tax_nanos,
        "total_nanos": document.total_nanos,
        "due_nanos": document.due_nanos,
        "payable_nanos": document.payable_nanos,
    }


def json_text(invoice: Invoice) -> str:
    return json.dumps(summary(invoice), indent=2, ensure_ascii=False) + "\n"


def write_csv(invoice: Invoice, path: Path) -> None:
    path.write_text(invoice_csv(invoice), encoding="utf-8")


def write_json(invoice: Invoice, path: Path) -> None:
    path.write_text(json_text(invoice), encoding="utf-8")
