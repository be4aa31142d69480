"""Prices a token class: one price, or prices that depend on its sum in the month.

flat        an integer: nanos per million tokens
graduated   each step's tokens at the step's price
volume      all tokens at the price of the step that their sum falls into
package     per whole package; a started package counts as whole
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

MTOK = 1_000_000
STEPS_MAX = 20

Nanos = Annotated[int, Field(strict=True, ge=0, le=10**15)]
Count = Annotated[int, Field(strict=True, ge=1, le=10**15)]


class _Price(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Price):
    """Sets the price up to and including `up_to_tokens` of a month. The last step has no end."""

    up_to_tokens: Count | None = None
    nanos_per_mtok: Nanos


def _ordered(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    *before, last = [step.up_to_tokens for step in steps]
    if last is not None or None in before:
        raise ValueError("the last step, and only it, has no up_to_tokens")
    ends = [end for end in before if end is not None]
    if any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError("each step's up_to_tokens is higher than the one before")
    return steps


Steps = Annotated[tuple[Step, ...], Field(min_length=1, max_length=STEPS_MAX), AfterValidator(_ordered)]


class Graduated(_Price):
    graduated: Steps


class Volume(_Price):
    volume: Steps


class PackageSize(_Price):
    tokens: Count
    nanos: Nanos


class Package(_Price):
    package: PackageSize


def _form(value: Any) -> str:
    for form, model in (("graduated", Graduated), ("volume", Volume), ("package", Package)):
        if isinstance(value, model) or (isinstance(value, dict) and form in value):
            return form
    return "flat"


TokenPrice = Annotated[
    Annotated[Nanos, Tag("flat")]
    | Annotated[Graduated, Tag("graduated")]
    | Annotated[Volume, Tag("volume")]
    | Annotated[Package, Tag("package")],
    Discriminator(_form),
]


@dataclass(frozen=True, slots=True)
class PriceComponent:
    """Prices `quantity` at `nanos` per `per`, which divides a million. `note` names the step or package."""

    note: str
    quantity: int
    nanos: int
    per: int = MTOK

    @property
    def micronanos(self) -> int:
        """The exact cost in millionths of a nano. The caller rounds after adding components up."""
        return self.quantity * self.nanos * (MTOK // self.per)


def list_price(price: "int | Graduated | Volume | Package") -> int:
    """Return the highest price of a token, in nanos per million. Holds and events are priced at it."""
    match price:
        case Graduated(graduated=steps) | Volume(volume=steps):
            return max(step.nanos_per_mtok for step in steps)
        case Package(package=size):
            return -(-size.nanos * MTOK // size.tokens)
        case _:
            return price


def price_components(
    price: "int | Graduated | Volume | Package", tokens: int, *, before: int = 0, total: int | None = None
) -> Sequence[PriceComponent]:
    """Split `tokens` of one month into priced components, whose costs add up to their cost.

    `before` tokens of the month have been counted already. `total` counts all that are counted together;
    without it, those before and these. Parts that follow each other cost together what the whole costs.
    """
    match price:
        case Graduated(graduated=steps):
            return _graduated(steps, before, before + tokens)
        case Volume(volume=steps):
            reached = before + tokens if total is None else total
            step = next(s for s in steps if s.up_to_tokens is None or reached <= s.up_to_tokens)
            note = "" if step.up_to_tokens is None else f"volume up to {step.up_to_tokens:,}"
            return [PriceComponent(note, tokens, step.nanos_per_mtok)]
        case Package(package=size):
            begun = -(-(before + tokens) // size.tokens) - -(-before // size.tokens)
            return [PriceComponent(f"packages of {size.tokens:,}", begun, size.nanos, per=1)]
        case _:
            return [PriceComponent("", tokens, price)]


def _graduated(steps: Sequence[Step], begin: int, end: int) -> list[PriceComponent]:
    """Split the tokens of a month from `begin` to `end` at the ends of the steps."""
    components: list[PriceComponent] = []
    step_begin = 0
    for step in steps:
        step_end = end if step.up_to_tokens is None else step.up_to_tokens
        quantity = max(min(end, step_end) - max(begin, step_begin), 0)
        is_last = end <= step_end
        if quantity or (is_last and not components):
            note = f"above {step_begin:,}" if step_begin else ""
            if not step_begin and step.up_to_tokens is not None:
                note = f"first {step.up_to_tokens:,}"
            components.append(PriceComponent(note, quantity, step.nanos_per_mtok))
        if is_last:
            break
        step_begin = step_end
    return components
