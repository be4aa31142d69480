"""Checks that refusals name what a grammar would leave out, and refuse nothing that real clients send."""

from typing import Any

import pytest

from serve.formats.schema_support import bad_reference, unsupported

TEXT = {"type": "string"}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}, "'maxLength' beside 'pattern'"),
        ({"type": "string", "format": "email", "minLength": 3}, "'minLength' beside 'format'"),
        ({"type": "string", "format": "colour"}, "'format' 'colour'"),
        ({"type": "integer", "multipleOf": 2}, "'multipleOf'"),
        ({"type": "array", "items": TEXT, "uniqueItems": True}, "'uniqueItems'"),
        ({"type": "array", "items": [TEXT]}, "'items' as a list (use 'prefixItems')"),
        ({"not": TEXT}, "'not'"),
        ({"type": "object", "properties": {"n": {"if": {}}}}, "'if' at 'properties.n'"),
        ({"allOf": [TEXT, {"enum": ["a"]}]}, "'allOf' of several schemas"),
        ({"type": "object", "properties": {}, "anyOf": [{"required": ["a"]}]}, "'properties' beside 'anyOf'"),
        ({"$ref": "#/$defs/x", "maxLength": 1, "$defs": {"x": TEXT}}, "'maxLength' beside '$ref'"),
        ({"maxLength": 1}, "'maxLength' without 'type'"),
        ({"type": "string", "pattern": "^(?=.*[0-9]).+$"}, "a 'pattern' that looks ahead or behind"),
        (
            {"type": "object", "properties": {"a": TEXT}, "patternProperties": {"^b": TEXT}},
            "'patternProperties' beside 'properties'",
        ),
        ({"type": "object", "propertyNames": TEXT, "properties": {}}, "'propertyNames' beside 'properties'"),
    ],
)
def test_what_a_grammar_would_leave_out_is_named(schema: dict[str, Any], reason: str) -> None:
    assert unsupported(schema) == reason


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object", "properties": {"not": TEXT, "multipleOf": TEXT, "maxLength": TEXT, "$ref": TEXT}},
        {"type": "object", "properties": {"a": {"enum": ["x"], "default": {"not": 1}}}},
        {"anyOf": [TEXT, {"type": "null"}], "default": None, "title": "Name", "description": "A name."},
        {"type": ["string", "null"], "maxLength": 4},
        {"type": "integer", "format": "int64", "minimum": 0},
        {"$ref": "#/$defs/Node", "$defs": {"Node": {"properties": {"next": {"$ref": "#/$defs/Node"}}}}},
        {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        {"type": "string", "format": "email", "pattern": "^[^@]+@[^@]+$"},
        {"type": "string", "pattern": r"^[(?=]\(\?=$"},
        {"type": "object", "propertyNames": TEXT, "additionalProperties": {}},
    ],
)
def test_what_clients_libraries_write_is_not_refused(schema: dict[str, Any]) -> None:
    assert unsupported(schema) is None
    assert bad_reference(schema) is None


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "https://example.com/schema"}, "the remote '$ref' 'https://example.com/schema'"),
        ({"items": {"$ref": "other.json#/x"}}, "the remote '$ref' 'other.json#/x' at 'items'"),
        ({"$ref": "#"}, "a cyclic '$ref'"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [TEXT, {"$ref": "#/$defs/a"}]}}},
            "a cyclic '$ref'",
        ),
        (
            {"$ref": "#/components/x", "components": {"x": TEXT}},
            "the '$ref' '#/components/x', which points at no schema of this document,",
        ),
        ({"$ref": 1}, "a '$ref' that is no text"),
    ],
)
def test_a_reference_that_cannot_be_followed_is_named(schema: dict[str, Any], reason: str) -> None:
    assert bad_reference(schema) == reason
