"""Bounds on what clients send, where types alone do not give one."""

import json
from collections.abc import Sequence
from typing import Any

from serve.errors import InvalidRequest


def bound(param: str, value: int, most: int, what: str | None = None) -> None:
    """Raises InvalidRequest if `value` is beyond `most`."""
    if value > most:
        raise InvalidRequest(f"'{param}' allows at most {most} {what or ''}".rstrip() + ".", param)


def check_tools(names: Sequence[str], *, forced: bool, function: str | None) -> None:
    """What holds of every dialect's tools: each has its own name, and what must be called is there.

    forced: some function must be called. function: this one. Raises InvalidRequest.
    """
    if len(set(names)) < len(names):
        raise InvalidRequest("Two tools have the same name.", "tools")
    if function is not None and function not in names:
        raise InvalidRequest("'tool_choice' names a function that is not in 'tools'.", "tool_choice")
    if forced and not names:
        raise InvalidRequest("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")


def schema_text(schema: dict[str, Any]) -> str:
    """A client's JSON Schema, which `serve.formats.schema_budget` has checked, as JSON text."""
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
