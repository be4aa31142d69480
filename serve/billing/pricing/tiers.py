"""What a class of tokens costs: one price, or prices by how many there are in the month.

flat        an integer: nanos per million tokens
graduated   each step's tokens at the step's price
volume      all tokens at the price of the step that their sum falls into
package     by the whole package, begun ones included
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


class _Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Step(_Shape):
    """Up to and with `up_to_tokens` of a month; the last step has no end."""

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


class Graduated(_Shape):
    graduated: Steps


class Volume(_Shape):
    volume: Steps


class PackageSize(_Shape):
    tokens: Count
    nanos: Nanos


class Package(_Shape):
    package: PackageSize


def _form(value: Any) -> str:
    for form, shape in (("graduated", Graduated), ("volume", Volume), ("package", Package)):
        if isinstance(value, shape) or (isinstance(value, dict) and form in value):
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
    """`quantity` at `nanos` per `per`, which divides a million. `note` says which part of the whole it is."""

    note: str
    quantity: int
    nanos: int
    per: int = MTOK

    @property
    def micronanos(self) -> int:
        """Millionths of a nano, exactly: rounding is left to who adds parts up."""
        return self.quantity * self.nanos * (MTOK // self.per)


def list_price(price: "int | Graduated | Volume | Package") -> int:
    """The most that a token can cost, in nanos per million: what events are priced, and held for, at."""
    match price:
        case Graduated(graduated=steps) | Volume(volume=steps):
            return max(step.nanos_per_mtok for step in steps)
        case Package(package=size):
            return -(-size.nanos * MTOK // size.tokens)
        case _:
            return price


def parts(price: "int | Graduated | Volume | Package", tokens: int) -> Sequence[PriceComponent]:
    """What `tokens` of one month are sold as; their costs add up to the class's."""
    match price:
        case Graduated(graduated=steps):
            return _graduated(steps, tokens)
        case Volume(volume=steps):
            step = next(s for s in steps if s.up_to_tokens is None or tokens <= s.up_to_tokens)
            note = "" if step.up_to_tokens is None else f"volume up to {step.up_to_tokens:,}"
            return [PriceComponent(note, tokens, step.nanos_per_mtok)]
        case Package(package=size):
            return [
                PriceComponent(f"packages of {size.tokens:,}", -(-tokens // size.tokens), size.nanos, per=1)
            ]
        case _:
            return [PriceComponent("", tokens, price)]


def _graduated(steps: Sequence[Step], tokens: int) -> list[PriceComponent]:
    made: list[PriceComponent] = []
    begin = 0
    for step in steps:
        end = tokens if step.up_to_tokens is None else min(tokens, step.up_to_tokens)
        if end > begin or not made:
            note = f"above {begin:,}" if begin else ""
            if not begin and step.up_to_tokens is not None:
                note = f"first {step.up_to_tokens:,}"
            made.append(PriceComponent(note, end - begin, step.nanos_per_mtok))
        begin = max(begin, end)
    return made
