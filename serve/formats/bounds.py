"""Checks bounds that field types cannot express: counts, tools, JSON Schemas."""

import json
from collections.abc import Sequence
from typing import Any

from serve.errors import InvalidRequest

SCHEMA_BYTES_MAX = 32 * 1024
SCHEMA_DEPTH_MAX = 32
SCHEMA_NODES_MAX = 2_000
SCHEMA_COUNT_MAX = 1_000  # repetitions: a grammar spells out each of them
SCHEMA_PATTERN_CHARS_MAX = 512

_REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


def bound(param: str, value: int, most: int, what: str | None = None) -> None:
    """Raises InvalidRequest if `value` is above `most`. `what` names the unit."""
    if value > most:
        raise InvalidRequest(f"'{param}' allows at most {most} {what or ''}".rstrip() + ".", param)


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


def schema_text(schema: Any, param: str) -> str:
    """A client's JSON Schema as JSON text, small enough to be compiled to a grammar.

    Raises InvalidRequest if it is not an object, too large, too deep, or repeats something too often.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' must be a JSON Schema object.", param, "invalid_value")
    _walk(schema, param)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode(errors="surrogatepass")) > SCHEMA_BYTES_MAX:
        raise InvalidRequest(f"'{param}' allows at most {SCHEMA_BYTES_MAX} bytes.", param, "invalid_value")
    return text


def _walk(schema: Any, param: str) -> None:
    """Checks depth, size and each node, level by level: recursion could overflow before the depth check."""
    level, depth, nodes = [schema], 0, 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > SCHEMA_DEPTH_MAX or nodes > SCHEMA_NODES_MAX:
            raise InvalidRequest(
                f"'{param}' may be {SCHEMA_DEPTH_MAX} levels deep and hold {SCHEMA_NODES_MAX} values.",
                param,
                "invalid_value",
            )
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                _check(node, param)
                below += node.values()
            elif isinstance(node, list):
                below += node
        level = below


def _check(node: dict[str, Any], param: str) -> None:
    for name in _REPETITIONS:
        value = node.get(name)
        if isinstance(value, int | float) and value > SCHEMA_COUNT_MAX:
            raise InvalidRequest(
                f"'{param}': {name} may be at most {SCHEMA_COUNT_MAX}.", param, "invalid_value"
            )
    pattern = node.get("pattern")
    if isinstance(pattern, str) and len(pattern) > SCHEMA_PATTERN_CHARS_MAX:
        raise InvalidRequest(
            f"'{param}': a pattern may have {SCHEMA_PATTERN_CHARS_MAX} characters.", param, "invalid_value"
        )
