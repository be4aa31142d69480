"""The part of JSON Schema that the engine's grammars hold, and the first keyword outside of it.

xgrammar, the engine's grammar library, leaves out in silence what it does not know, and an answer would
break the client's schema. This module names the keyword before anything is reserved. vLLM makes a similar
check (`has_xgrammar_unsupported_json_features`), of answer formats only and without a name; whatever that
refuses is refused here too (`tests/serve/engine/vllm/test_grammars.py`).
"""

import re
from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

# fmt: off
FORMATS = frozenset({
    "date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "json-pointer",
    "relative-json-pointer", "time", "uri", "uri-reference", "uri-template", "uuid",
})
# fmt: on
# Measured on xgrammar 0.2.8: an answer that breaks one of these is accepted.
_UNKNOWN = (
    "not",
    "if",
    "then",
    "else",
    "dependentRequired",
    "dependentSchemas",
    "dependencies",
    "contains",
    "minContains",
    "maxContains",
    "uniqueItems",
    "multipleOf",
    "$dynamicRef",
    "$recursiveRef",
)
# Each of these decides alone: its neighbours are dropped.
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_LENGTHS = ("minLength", "maxLength")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_STRINGS = (*_LENGTHS, "pattern", "format")
_ARRAYS = ("items", "prefixItems", "minItems", "maxItems")
_OBJECTS = (
    "properties",
    "required",
    "additionalProperties",
    "unevaluatedProperties",
    "patternProperties",
    "propertyNames",
    "minProperties",
    "maxProperties",
)
_CONSTRAINTS = (*_ALONE, "enum", "const", *_OBJECTS, *_ARRAYS, *_STRINGS, *_NUMBERS)
# Without a `type` these are dropped; from the others the type is inferred.
_NEED_TYPE = (*_STRINGS, *_NUMBERS, "minItems", "maxItems", "required", "minProperties", "maxProperties")
_INFER_TYPE = ("properties", "additionalProperties", "unevaluatedProperties", "items", "prefixItems")

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    "items",
    "additionalProperties",
    "unevaluatedProperties",
    "additionalItems",
    "unevaluatedItems",
    "propertyNames",
    "contains",
    "not",
    "if",
    "then",
    "else",
)
_ESCAPES_AND_CLASSES = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_LOOKAROUND = re.compile(r"\(\?<?[=!]")


def unsupported(schema: Json) -> str | None:
    """The first thing that a grammar would not hold, as `'multipleOf' at 'properties.n'`; None if all holds.

    The schema is small enough to be walked (`serve.formats.schema_budget`).
    """
    for path, node in _schemas(schema):
        if found := _unsupported_in(node):
            return f"{found} at '{path}'" if path else found
    return None


def bad_reference(schema: Json) -> str | None:
    """The first `$ref` that is remote, cyclic or to no schema of this document; None if all can be followed.

    A schema may hold itself in a property or an item, as a tree does. It is cyclic if it is itself.
    """
    nodes = list(_schemas(schema))
    places = {id(node) for _, node in nodes}
    same: dict[int, list[int]] = {}  # of each schema, those that an answer must fit at the same place
    for path, node in nodes:
        where = f" at '{path}'" if path else ""
        branches = [node[key] for key in ("anyOf", "oneOf", "allOf") if isinstance(node.get(key), list)]
        same[id(node)] = [id(branch) for group in branches for branch in group if isinstance(branch, dict)]
        if "$ref" not in node:
            continue
        ref = node["$ref"]
        if not isinstance(ref, str):
            return f"a '$ref' that is no text{where}"
        if ref != "#" and not ref.startswith("#/"):
            return f"the remote '$ref' {ref[:64]!r}{where}"
        target = id(_resolve(ref, schema))
        if target not in places:
            return f"the '$ref' {ref[:64]!r}{where}, which points at no schema of this document,"
        same[id(node)].append(target)
    return "a cyclic '$ref'" if _cyclic(same) else None


def _cyclic(graph: dict[int, list[int]]) -> bool:
    """Peels off what leads nowhere; what is left leads in a circle."""
    before: dict[int, list[int]] = {}
    for node, targets in graph.items():
        for target in targets:
            before.setdefault(target, []).append(node)
    count = {node: len(targets) for node, targets in graph.items()}
    ends = [node for node, targets in graph.items() if not targets]
    for end in ends:
        for node in before.get(end, ()):
            count[node] -= 1
            if not count[node]:
                ends.append(node)
    return len(ends) < len(graph)


def _schemas(schema: Json) -> Iterator[tuple[str, Json]]:
    """Each schema within `schema`, which is the first, with its path."""
    waiting: list[tuple[str, Any]] = [("", schema)]
    for path, node in waiting:
        if not isinstance(node, dict):
            continue
        yield path, node
        prefix = f"{path}." if path else ""
        for key in _MAPS:
            if isinstance(children := node.get(key), dict):
                waiting += ((f"{prefix}{key}.{name}", child) for name, child in children.items())
        for key in _LISTS:
            if isinstance(children := node.get(key), list):
                waiting += ((f"{prefix}{key}.{index}", child) for index, child in enumerate(children))
        waiting += ((f"{prefix}{key}", node[key]) for key in _SINGLE if isinstance(node.get(key), dict))


def _unsupported_in(node: Json) -> str | None:
    """The first thing in one schema, without those below it."""
    for key in _UNKNOWN:
        if key in node:
            return f"'{key}'"
    for key in _ALONE:
        if key in node and (others := [other for other in _CONSTRAINTS if other in node and other != key]):
            return f"'{others[0]}' beside '{key}'"
    if isinstance(branches := node.get("allOf"), list) and len(branches) > 1:
        return "'allOf' of several schemas"
    if isinstance(node.get("items"), list):
        return "'items' as a list (use 'prefixItems')"
    if "type" not in node and not any(key in node for key in (*_INFER_TYPE, "enum", "const", *_ALONE)):
        for key in (*_NEED_TYPE, "patternProperties", "propertyNames"):
            if key in node:
                return f"'{key}' without 'type'"
    return _unsupported_string(node) or _unsupported_object(node)


def _unsupported_string(node: Json) -> str | None:
    if "string" in _types(node) and "format" in node:
        kind = node["format"]
        if not isinstance(kind, str) or kind not in FORMATS:
            return f"'format' {str(kind)[:64]!r}"
    for key in ("pattern", "format"):
        if key in node:
            for length in _LENGTHS:
                if length in node and (key == "pattern" or "string" in _types(node)):
                    return f"'{length}' beside '{key}'"
    patterns = [node.get("pattern")]
    if isinstance(keys := node.get("patternProperties"), dict):
        patterns += keys
    for pattern in patterns:
        if isinstance(pattern, str) and _LOOKAROUND.search(_ESCAPES_AND_CLASSES.sub("", pattern)):
            return "a 'pattern' that looks ahead or behind"
    return None


def _unsupported_object(node: Json) -> str | None:
    if isinstance(patterns := node.get("patternProperties"), dict):
        if "properties" in node:
            return "'patternProperties' beside 'properties'"
        if len(patterns) > 1:
            return "'patternProperties' of several patterns"
    if "propertyNames" in node:
        for key in ("patternProperties", "properties"):
            if key in node:
                return f"'propertyNames' beside '{key}'"
        if node.get("unevaluatedProperties", True) is not True:
            return "'propertyNames' beside 'unevaluatedProperties'"
        names = node["propertyNames"]
        if isinstance(names, dict) and ("pattern" in names or "format" in names):
            for length in _LENGTHS:
                if length in names:
                    return f"'propertyNames' with '{length}' beside a pattern"
    return None


def _resolve(ref: str, root: Json) -> Any:
    """Follows a reference as xgrammar does: through objects, without escapes."""
    node: Any = root
    for part in ref.split("/")[1:]:
        if not isinstance(node, dict):
            return None
        node = node.get(part)
    return node


def _types(node: Json) -> tuple[str, ...]:
    kinds = node.get("type")
    if isinstance(kinds, str):
        return (kinds,)
    return tuple(kind for kind in kinds if isinstance(kind, str)) if isinstance(kinds, list) else ()
