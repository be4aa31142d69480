"""Printable text: names what no font has, field by field, before a document with it is final."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from serve.billing.invoicing.typefaces import described, unprintable
from serve.errors import Conflict, InvalidRequest

SHOWN_MAX = 5


def require_printable(document: BaseModel, what: str) -> None:
    """Raises Conflict if `document`, called `what`, has letters that no font has."""
    for field, text in fields_of(document):
        if message := _refusal(field, text):
            raise Conflict(f"{what} cannot be printed: {message}")


def require_printable_input(document: BaseModel) -> None:
    """Raises InvalidRequest, which names the field, if the input `document` has letters that no font has."""
    for field, text in fields_of(document):
        if message := _refusal(field, text):
            raise InvalidRequest(message[0].upper() + message[1:], field, "unprintable_text")


def fields_of(document: BaseModel) -> Iterator[tuple[str, str]]:
    """Yields the path and the text of each string within `document`."""
    yield from _strings("", document.model_dump())


def _strings(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _strings(f"{path}.{name}" if path else str(name), item)
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from _strings(f"{path}.{position}", item)


def _refusal(field: str, text: str) -> str:
    if not (missing := unprintable(text)):
        return ""
    shown = ", ".join(described(cluster) for cluster in missing[:SHOWN_MAX])
    more = f", and {len(missing) - SHOWN_MAX} more" if len(missing) > SHOWN_MAX else ""
    return f"no font for invoices has these letters of '{field}': {shown}{more}."
