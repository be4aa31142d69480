"""`bespoke invoice credit-note`: part of a final invoice given back, or all of it."""

from typing import Annotated

import typer

from serve.billing.invoicing.credit_notes import CreditNotes
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.pdf import note_pdf_bytes
from serve.billing.money import labelled, nanos_of
from serve.commands.common import HomeOption, InvoiceArgument, console, now, open_store, settings_of
from serve.commands.invoice_files import folder_of
from serve.errors import OperatorError
from serve.tenants.audit import command_actor


def credit_note(
    number: InvoiceArgument,
    amount: Annotated[str, typer.Argument(help="Gross, such as 12.50.")],
    reason: Annotated[str, typer.Option(help="Printed on the credit note.")],
    line: Annotated[int | None, typer.Option(min=1, help="The invoice line that it is for, from 1.")] = None,
    home: HomeOption = None,
) -> None:
    """Give back part of a final invoice, or all of it."""
    settings = settings_of(home)
    store = open_store(settings)
    if not 1 <= len(reason) <= 200 or not reason.isprintable():
        raise OperatorError("A reason has 1 to 200 printable characters.")
    note = CreditNotes(store).issue(
        number, [(line, _nanos(amount))], reason=reason, at=now(), actor=command_actor()
    )
    invoice = Invoices(store).get(number)
    path = folder_of(settings, invoice) / f"{note.number}.pdf"
    path.write_bytes(note_pdf_bytes(note, invoice))
    document = note.document
    credited = f"{labelled(document.amount_nanos, document.currency)} of {document.invoice}"
    console.print(f"[bold]{note.number}[/] credits {credited}")
    console.print(f"  {path}", markup=False)


def _nanos(amount: str) -> int:
    try:
        return nanos_of(amount)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
