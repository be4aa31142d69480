"""Invoice document: the content of an invoice. Equal documents bill the same amounts to the same buyer."""

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from serve.billing.metering.events import label_of
from serve.billing.money import labelled, round_nanos
from serve.billing.pricing.plans import Included, Proration, TiersOver

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


class TierCount(_DocumentPart):
    """Counts a line's `tokens` of a class among those that share its steps: `before` them and in `total`."""

    before: int
    tokens: int
    total: int


class LineItem(_DocumentPart):
    """Prices `quantity` of `what` at `nanos` per `per`. `included` more were free.

    `counted` is set if the price has steps or packages; all of a line's items of a token class share it.
    """

    what: str
    quantity: int
    nanos: int
    per: int
    included: int = 0
    counted: TierCount | None = None

    @property
    def note(self) -> str:
        """Say what was free, and which other tokens decided the step."""
        notes = [f"{self.included:,} more included"] if self.included else []
        if self.counted and self.counted.total > self.counted.tokens:
            after = f"after {self.counted.before:,} of " if self.counted.before else ""
            notes.append(f"{after}{self.counted.total:,} counted together")
        return ", ".join(notes)


class InvoiceLine(_DocumentPart):
    """Bills one model and tier, one charge, or a minimum. `list_nanos` is what was charged at use.

    `late` is the earlier month of use, if that month's invoice was final already. `tiers_over` is the plan's
    choice of what is counted together, if a price of the line has steps or packages.
    """

    kind: Kind = "usage"
    model: str
    price: str
    plan_id: int | None = None
    adapter: bool = False
    tier: str = "default"
    tiers_over: TiersOver | None = None
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


class PlanDays(_DocumentPart):
    """Names the days of the month on which a price version was in force, and what it gives to the month."""

    price: str
    days: int
    days_of_month: int
    minimum_nanos: int
    included: Included


class InvoiceDocument(_DocumentPart):
    """Holds an invoice's content. Amounts are exact nanos of the currency; only the payable one is rounded.

    subtotal = sum of lines; total = subtotal − promotional credits + tax; due = total − prepaid credits.
    `plan_days` is empty if no minimum and no included tokens are agreed; `proration` is how they are counted.
    """

    tenant: str
    period: str
    currency: str
    plan: str | None = None
    seller: Party | None = None
    buyer: Party | None = None
    proration: Proration = "none"
    plan_days: tuple[PlanDays, ...] = ()
    lines: tuple[InvoiceLine, ...]
    credits: tuple[CreditApplied, ...] = ()
    tax: TaxApplied | None = None

    @property
    def counting(self) -> tuple[str, ...]:
        """Return sentences that say how tiers, minimum and included tokens were counted."""
        tiers = sorted({(line.price, line.tiers_over) for line in self.lines if line.tiers_over})
        return (
            *(f"Tiers of {price}: {_COUNTED[over]}" for price, over in tiers),
            *([f"{_PRORATED[self.proration]} {self._shares}."] if self.plan_days else []),
        )

    @property
    def _shares(self) -> str:
        return "; ".join(_share(plan_days, self.currency) for plan_days in self.plan_days)

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


_COUNTED: Mapping[TiersOver, str] = {
    "model": "the tokens of each model are counted together, under all its names and price versions; batches "
    "by themselves.",
    "kind": "the tokens of all bases are counted together, and those of all adapters, under all price "
    "versions; batches by themselves.",
    "all": "the tokens of all models are counted together, under all price versions, batches included.",
}
_PRORATED: Mapping[Proration, str] = {
    "day": "Minimum and included tokens are prorated by day (UTC):",
    "none": "Minimum and included tokens are not prorated:",
}


def _share(plan_days: PlanDays, currency: str) -> str:
    included = plan_days.included
    classes = (
        ("prompt tokens", included.prompt_tokens),
        ("cached prompt tokens", included.cached_prompt_tokens),
        ("completion tokens", included.completion_tokens),
    )
    parts = [f"{count:,} {name} included" for name, count in classes if count]
    if plan_days.minimum_nanos:
        parts.insert(0, f"a minimum of {labelled(plan_days.minimum_nanos, currency)}")
    given = ", ".join(parts) or "nothing"
    return f"{plan_days.price} (in force on {plan_days.days} of {plan_days.days_of_month} days): {given}"


def sha256_of(number: str, issued_at: datetime, document: str) -> str:
    """Return the fingerprint of a final document: of its number, its time and its text."""
    fingerprint_input = json.dumps([number, issued_at.isoformat(), document])
    return hashlib.sha256(fingerprint_input.encode()).hexdigest()
