"""Writes invoices to the folders of their tenants, as PDF, CSV and JSON."""

from enum import StrEnum
from pathlib import Path

from serve.billing.invoicing.export import write_csv, write_json
from serve.billing.invoicing.pdf import write_pdf
from serve.billing.invoicing.store import Invoice
from serve.settings import Settings


class Format(StrEnum):
    CSV = "csv"
    PDF = "pdf"
    JSON = "json"


WRITERS = {Format.CSV: write_csv, Format.PDF: write_pdf, Format.JSON: write_json}


def folder_of(settings: Settings, invoice: Invoice) -> Path:
    """The folder of the invoice's tenant, which is created if it is missing."""
    folder = settings.invoices_dir / invoice.document.tenant
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(settings: Settings, invoice: Invoice, form: Format) -> Path:
    """Writes the invoice, and returns the file's path."""
    path = folder_of(settings, invoice) / f"{invoice.number}.{form.value}"
    WRITERS[form](invoice, path)
    return path
