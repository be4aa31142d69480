"""Checks bounds that field types cannot express: counts, tools, JSON Schemas."""

import json
from collections.abc import Sequence
from typing import Any

from serve.errors import InvalidRequest


def bound(param: str, value: int, most: int, what: str | None = None) -> None:
    """Raises InvalidRequest if `value` is above `most`. `what` names the unit."""
    if value > most:
        raise InvalidRequest(f"'{param}' allows at most {most} {what or ''}".rstrip() + ".", param)


def clamped(value: int | None, most: int) -> int | None:
    """Returns the client's "at most" under our own bound.

    Clients send large defaults, 4,096 say, without a thought of the model: such a bound is no wish.
    """
    return None if value is None else min(value, most)


def check_tools(names: Sequence[str], *, forced: bool, function: str | None) -> None:
    """Raises InvalidRequest if two tools share a name, or if the tool that must be called is missing.

    Every API's tools follow these rules. forced: some function must be called. function: this one must be.
    """
    if len(set(names)) < len(names):
        raise InvalidRequest("Two tools have the same name.", "tools")
    if function is not None and function not in names:
        raise InvalidRequest("'tool_choice' names a function that is not in 'tools'.", "tool_choice")
    if forced and not names:
        raise InvalidRequest("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")


def schema_text(schema: dict[str, Any]) -> str:
    """Returns a client's JSON Schema, which `serve.formats.schema_budget` has checked, as JSON text."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def schema_of(document: dict[str, Any] | str, param: str) -> dict[str, Any]:
    """Returns a JSON Schema that a client gives as an object or as JSON text. Raises InvalidRequest."""
    if isinstance(document, dict):
        return document
    try:
        schema = json.loads(document)
    except (ValueError, RecursionError):
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' must be a JSON Schema: an object.", param, "invalid_value")
    return schema
