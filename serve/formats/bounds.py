"""Bounds on what clients send, where types alone do not give one."""

import json
from collections.abc import Sequence
from typing import Any

from serve.errors import InvalidRequest

SCHEMA_BYTES_MAX = 32 * 1024
SCHEMA_DEPTH_MAX = 32
SCHEMA_NODES_MAX = 2_000
SCHEMA_COUNT_MAX = 1_000  # of repetitions, which a grammar spells out one by one
SCHEMA_PATTERN_CHARS_MAX = 512

_REPETITIONS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")


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


def schema_text(schema: Any, param: str) -> str:
    """A client's JSON Schema as JSON text, small enough that a grammar can be made of it.

    Raises InvalidRequest: it is no object, too large, too deep, or repeats something too often.
    """
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' must be a JSON Schema object.", param, "invalid_value")
    _walk(schema, param)
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    if len(text.encode(errors="surrogatepass")) > SCHEMA_BYTES_MAX:
        raise InvalidRequest(f"'{param}' allows at most {SCHEMA_BYTES_MAX} bytes.", param, "invalid_value")
    return text


def _walk(schema: Any, param: str) -> None:
    """Without recursion: how deep it may be is what is being checked."""
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
