"""Invoice document: the content of an invoice. Equal documents bill the same amounts to the same buyer."""

import hashlib
import json
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from serve.billing.metering.events import label_of
from serve.billing.money import round_nanos

Kind = Literal["usage", "training", "residency", "minimum"]

# Line breaks only in addresses; no control characters anywhere.
OneLine = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=200)]
Lines = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x09\x0b-\x1f\x7f]*$", max_length=500)]


class _DocumentPart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Party(_DocumentPart):
    """Describes the seller or the buyer, with what a tax office requires."""

    name: Annotated[OneLine, Field(min_length=1)]
    address: Lines = ""
    tax_id: Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=60)] = ""
    email: OneLine = ""
    payment: Annotated[Lines, Field(description="How to pay: a bank account, say. The seller's.")] = ""


class LineItem(_DocumentPart):
    """Prices `quantity` of `what` at `nanos` per `per`. `included` more were free."""

    what: str
    quantity: int
    nanos: int
    per: int
    included: int = 0


class InvoiceLine(_DocumentPart):
    """Bills one model and tier, one charge, or a minimum. `list_nanos` is what was charged at use.

    `late` is the earlier month of use, if that month's invoice was final already.
    """

    kind: Kind = "usage"
    model: str
    price: str
    plan_id: int | None = None
    adapter: bool = False
    tier: str = "default"
    requests: int = 0
    items: tuple[LineItem, ...] = ()
    list_nanos: int
    amount_nanos: int
    late: str | None = None

    @property
    def label(self) -> str:
        label = label_of(self.model, self.tier)
        return label if self.late is None else f"{label}, late usage of {self.late}"


class CreditApplied(_DocumentPart):
    """Applies part of a credit grant to the invoice."""

    grant: str
    kind: Literal["promotional", "prepaid"]
    amount_nanos: int


class TaxApplied(_DocumentPart):
    """Applies a tax to the invoice."""

    name: str
    percent: str
    taxable_nanos: int
    amount_nanos: int


class InvoiceDocument(_DocumentPart):
    """Holds an invoice's content. Amounts are exact nanos of the currency; only the payable one is rounded.

    subtotal = sum of lines; total = subtotal − promotional credits + tax; due = total − prepaid credits.
    """

    tenant: str
    period: str
    currency: str
    plan: str | None = None
    seller: Party | None = None
    buyer: Party | None = None
    lines: tuple[InvoiceLine, ...]
    credits: tuple[CreditApplied, ...] = ()
    tax: TaxApplied | None = None

    @property
    def subtotal_nanos(self) -> int:
        return sum(line.amount_nanos for line in self.lines)

    @property
    def list_nanos(self) -> int:
        return sum(line.list_nanos for line in self.lines)

    def credited_nanos(self, kind: str) -> int:
        return sum(credit.amount_nanos for credit in self.credits if credit.kind == kind)

    @property
    def tax_nanos(self) -> int:
        return self.tax.amount_nanos if self.tax else 0

    @property
    def total_nanos(self) -> int:
        return self.subtotal_nanos - self.credited_nanos("promotional") + self.tax_nanos

    @property
    def due_nanos(self) -> int:
        return self.total_nanos - self.credited_nanos("prepaid")

    @property
    def payable_nanos(self) -> int:
        """The amount due, rounded half to even to the currency's smallest unit."""
        return round_nanos(self.due_nanos, self.currency)

    @property
    def creditable_nanos(self) -> int:
        """What is paid for the invoice, prepaid credit included, in smallest units of the currency."""
        return round_nanos(self.payable_nanos + self.credited_nanos("prepaid"), self.currency)


def sha256_of(number: str, issued_at: datetime, document: str) -> str:
    """Return the fingerprint of a final document: of its number, its time and its text."""
    fingerprint_input = json.dumps([number, issued_at.isoformat(), document])
    return hashlib.sha256(fingerprint_input.encode()).hexdigest()
