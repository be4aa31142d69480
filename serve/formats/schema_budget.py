"""Bounds what all JSON Schemas of a request may cost together, before anything is reserved.

The engine makes grammars of them, on threads that all tenants share. A schema of a kilobyte can ask for
minutes there, so each dimension that a grammar grows with has its own bound.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from serve.errors import InvalidRequest
from serve.formats.schema_support import bad_reference, unsupported

SCHEMA_BYTES_MAX = 32 * 1024
SCHEMA_DEPTH_MAX = 32
SCHEMA_NODES_MAX = 2_000
SCHEMA_COUNT_MAX = 1_000  # of one repetition
SCHEMA_PATTERN_CHARS_MAX = 512
PATTERN_COUNT_MAX = 128  # of `{n,m}`: xgrammar 0.2.8 compiles no more, and says so too late

# Of all schemas of a request together.
BYTES_MAX = 256 * 1024
NODES_MAX = 10_000
ENUM_VALUES_MAX = 2_000
PATTERN_CHARS_MAX = 4_096
DISTINCT_LENGTHS_MAX = 16
# A grammar has a state for each character of a bounded string, and a mask of the whole vocabulary for each
# state: 128 take about a second of a core. What is longer than 128 it counts without more states. The same
# bounds again cost little more, so only different ones are summed.
LENGTH_STATES_MAX = 128
STATES_MAX = 384  # 3 s, all that the engine grants a grammar
REPETITIONS_SUM_MAX = 20_000

_LENGTHS = ("minLength", "maxLength")
_ITEMS = ("minItems", "maxItems")
_PROPERTIES = ("minProperties", "maxProperties")
_ATOM = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|.", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Schema:
    """One JSON Schema of a request. `param` is the client's name for its place; `tool` whose it is.

    Without `strict` an answer need not fit it exactly.
    """

    param: str
    document: dict[str, Any]
    tool: str | None = None
    strict: bool = True


@dataclass(slots=True)
class _Spent:
    bytes: int = 0
    nodes: int = 0
    enum_values: int = 0
    pattern_chars: int = 0
    repetitions: int = 0
    states: dict[str, int] = field(default_factory=dict)  # of each different length or repeating pattern


def check_schemas(schemas: Sequence[Schema]) -> None:
    """Raises InvalidRequest, naming the schema that is too much, or says what no grammar holds."""
    spent = _Spent()
    for schema in schemas:
        for node in _nodes(schema, spent):
            _spend(node, schema, spent)
            _check_sums(schema, spent)
        size = len(json.dumps(schema.document, ensure_ascii=False).encode(errors="surrogatepass"))
        spent.bytes += size
        if size > SCHEMA_BYTES_MAX:
            raise _refused(schema, f"allows at most {SCHEMA_BYTES_MAX} bytes")
        _check_total(schema, "bytes", spent.bytes, BYTES_MAX)
        if reason := bad_reference(schema.document):
            raise _refused(schema, f"holds {reason} and is refused")
        if schema.strict and (reason := unsupported(schema.document)):
            hint = "" if schema.tool is None else " A tool that is not 'strict' may use it."
            raise _refused(schema, f"uses {reason}, which the engine's grammars do not hold", hint)


def _nodes(schema: Schema, spent: _Spent) -> Iterator[dict[str, Any]]:
    """Each object within, whether a schema or not. Without recursion: the depth is what is being checked."""
    level: list[Any] = [schema.document]
    depth = nodes = 0
    while level:
        depth, nodes = depth + 1, nodes + len(level)
        if depth > SCHEMA_DEPTH_MAX or nodes > SCHEMA_NODES_MAX:
            text = f"may be {SCHEMA_DEPTH_MAX} levels deep and hold {SCHEMA_NODES_MAX} values"
            raise _refused(schema, text)
        spent.nodes += len(level)
        _check_total(schema, "values", spent.nodes, NODES_MAX)
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                yield node
                below += node.values()
            elif isinstance(node, list):
                below += node
        level = below


def _spend(node: dict[str, Any], schema: Schema, spent: _Spent) -> None:
    for name in (*_LENGTHS, *_ITEMS, *_PROPERTIES):
        if (count := _count(node, name, schema)) is None:
            continue
        if name in _LENGTHS or name in _ITEMS:
            spent.repetitions += count
        else:
            # Each number of properties is a state beside each property.
            properties = node.get("properties")
            spent.repetitions += 8 * count * (len(properties) if isinstance(properties, dict) else 1)
    low, high = (_count(node, name, schema) for name in _LENGTHS)
    if low is not None or high is not None:
        spent.states[f"{low} to {high}"] = min(LENGTH_STATES_MAX, max(low or 0, high or 0))
    if isinstance(values := node.get("enum"), list):
        spent.enum_values += len(values)
    patterns = [node.get("pattern")]
    if isinstance(keys := node.get("patternProperties"), dict):
        patterns += keys
    for pattern in patterns:
        if isinstance(pattern, str):
            if len(pattern) > SCHEMA_PATTERN_CHARS_MAX:
                raise _refused(schema, f"has a pattern of more than {SCHEMA_PATTERN_CHARS_MAX} characters")
            spent.pattern_chars += len(pattern)
            if max(_counts(pattern), default=0) > PATTERN_COUNT_MAX:
                raise _refused(schema, f"has a pattern with a repetition above {PATTERN_COUNT_MAX}")
            if repeated := repetitions(pattern):
                spent.states[f"pattern {pattern}"] = repeated
                spent.repetitions += repeated


def _count(node: dict[str, Any], name: str, schema: Schema) -> int | None:
    """A repetition's number; None if there is none, or the name is a property's."""
    value = node.get(name)
    if value is None or isinstance(value, dict | str | list | bool):
        return None
    if value < 0:
        raise _refused(schema, f"has a negative '{name}'")
    if isinstance(value, float) and not value.is_integer():
        raise _refused(schema, f"has a '{name}' that is no whole number")
    if value > SCHEMA_COUNT_MAX:
        raise _refused(schema, f"has a '{name}' above {SCHEMA_COUNT_MAX}")
    return int(value)


def _counts(pattern: str) -> Iterator[int]:
    for match in _ATOM.finditer(pattern):
        if match[1] is not None:
            yield max(int(match[1]), int(match[2] or 0))


def repetitions(pattern: str) -> int:
    """How many atoms the counted repetitions of a regular expression spell out; 0 without any.

    Groups multiply: `(a{10}b){10}` spells out 110.
    """
    groups, last, counted = [0], 0, False
    for match in _ATOM.finditer(pattern):
        text = match[0]
        if match[1] is not None:
            counted = True
            most = max(int(match[1]), int(match[2] or 0))
            groups[-1] += last * (most - 1) if most else 0
            last *= max(1, most)
        elif text == "(":
            groups.append(0)
        elif text == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif text not in ")|^$?*+":
            last = 1
            groups[-1] += 1
    return sum(groups) if counted else 0


def _check_sums(schema: Schema, spent: _Spent) -> None:
    _check_total(schema, "values of 'enum'", spent.enum_values, ENUM_VALUES_MAX)
    _check_total(schema, "characters of patterns", spent.pattern_chars, PATTERN_CHARS_MAX)
    _check_total(schema, "different lengths", len(spent.states), DISTINCT_LENGTHS_MAX)
    _check_total(schema, "characters of different lengths", sum(spent.states.values()), STATES_MAX)
    _check_total(schema, "as the sum of its repetitions", spent.repetitions, REPETITIONS_SUM_MAX)


def _check_total(schema: Schema, what: str, value: int, most: int) -> None:
    if value > most:
        text = f"is too much: the schemas of a request may have {most} {what} together"
        raise _refused(schema, text)


def _refused(schema: Schema, text: str, hint: str = "") -> InvalidRequest:
    tool = f" of the tool '{schema.tool}'" if schema.tool is not None else ""
    return InvalidRequest(f"'{schema.param}'{tool} {text}.{hint}", schema.param, "invalid_value")
