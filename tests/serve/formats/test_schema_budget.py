"""One budget for all schemas of a request, checked in bounded time before anything is reserved."""

import contextlib
import json
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import InvalidRequest
from serve.formats import schema_budget as budget
from serve.formats.chat import ChatCompletionRequest
from serve.formats.messages.request import MessagesRequest
from serve.formats.responses.request import ResponsesRequest
from serve.formats.sampling import parse
from serve.formats.schema_budget import Schema, check_schemas, repetitions

TEXT = {"type": "string"}
CHECK_CPU_S_MAX = 0.5


def check(*documents: dict[str, Any]) -> None:
    check_schemas([Schema(f"tools.{index}", document) for index, document in enumerate(documents)])


def strings(**lengths: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "maxLength": length} for name, length in lengths.items()},
    }


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def pattern_properties(depth: int) -> dict[str, Any]:
    """Optional properties beside patterns, which outlines writes out in all their orders."""
    schema: dict[str, Any] = TEXT
    for _ in range(depth):
        schema = {
            "type": "object",
            "properties": {"a": schema, "b": TEXT, "c": TEXT},
            "patternProperties": {"^x": schema, "^y": TEXT},
        }
    return schema


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (nested(budget.SCHEMA_DEPTH_MAX), "levels deep"),
        ({"enum": ["x" * 40_000]}, "bytes"),
        ({"enum": list(range(3_000))}, "values"),
        ({"type": "array", "minItems": 10**9}, "'minItems' above"),
        (strings(a=10**6), "'maxLength' above"),
        (strings(a=-1), "negative 'maxLength'"),
        ({"type": "string", "maxLength": 1.5}, "no whole number"),
        ({"type": "string", "pattern": "a" * 600}, "characters"),
        ({"type": "string", "pattern": "^a{1,129}$"}, "repetition above"),
        ({"type": "string", "pattern": "^((a{20}b){20}c){20}$"}, "characters of different lengths"),
        (strings(**{f"k{length}": length for length in range(1, 61)}), "different lengths"),
        (strings(a=1000, b=999, c=998, d=997, e=996), "characters of different lengths"),
        (
            {"type": "object", "properties": {f"k{i}": TEXT for i in range(200)}, "maxProperties": 100},
            "sum of its repetitions",
        ),
        (
            {"prefixItems": [{"type": "string", "minLength": n, "maxLength": 255} for n in range(5)]},
            "characters of different lengths",
        ),
        ({"$ref": "https://example.com/x"}, "remote '$ref'"),
        ({"$ref": "#"}, "cyclic '$ref'"),
    ],
)
def test_a_schema_that_would_make_a_huge_grammar_is_refused(schema: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(text)) as refused:
        check(schema)
    assert refused.value.param == "tools.0"


@pytest.mark.parametrize(
    "schemas",
    [
        [{"enum": list(range(900))}] * 3,
        [{"enum": ["x" * 30_000]}] * 9,
        [strings(**{f"k{one}": 20 * part + one for one in range(9)}) for part in range(2)],
        [strings(**{f"k{one}": 500 for one in range(25)})] * 2,
        [{"type": "string", "pattern": f"^{number}{'a' * 480}$"} for number in range(9)],
        [{"type": "object", "properties": {f"k{one}": {} for one in range(1_900)}}] * 6,
    ],
    ids=["enum values", "bytes", "different lengths", "repetitions", "pattern characters", "nodes"],
)
def test_schemas_that_fit_alone_are_refused_together(schemas: list[dict[str, Any]]) -> None:
    for schema in schemas:
        check(schema)
    with pytest.raises(InvalidRequest, match="together") as refused:
        check(*schemas)
    assert refused.value.param != "tools.0"


@pytest.mark.parametrize(
    "schema",
    [
        *(pattern_properties(depth) for depth in (6, 9)),
        strings(**{f"k{length}": length for length in range(941, 1001)}),
        {"anyOf": [{"$ref": f"#/$defs/d{one}"} for one in range(400)]}
        | {"$defs": {f"d{one}": {"$ref": f"#/$defs/d{one + 1}"} for one in range(399)} | {"d399": TEXT}},
        {"type": "string", "pattern": "(" * 512},
        {"type": "string", "pattern": "[" * 512},
        {"type": "string", "pattern": "{9" * 256},
        {"enum": list(range(400_000))},
    ],
)
def test_an_attack_is_judged_in_bounded_cpu_time(schema: dict[str, Any]) -> None:
    start = time.process_time()
    with contextlib.suppress(InvalidRequest):
        check(*[schema] * 8)
    assert time.process_time() - start < CHECK_CPU_S_MAX


def test_the_attack_of_six_levels_is_refused_by_its_keyword() -> None:
    with pytest.raises(InvalidRequest, match="'patternProperties' beside 'properties'"):
        check(pattern_properties(6))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("^[a-z]+$", 0),
        ("a{3}", 3),
        ("a{2,5}b", 6),
        ("(a{10}b){10}", 110),
        (r"\d{4}-\d{2}", 7),
        (r"a\{9}", 0),
        ("[{9}]", 0),
        ("a{0}", 1),
        ("(ab){3,}", 6),
    ],
)
def test_the_repetitions_of_a_pattern_are_counted(pattern: str, count: int) -> None:
    assert repetitions(pattern) == count


BAD = {"type": "object", "properties": {"k": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}}}
KEYWORD = "'maxLength' beside 'pattern' at 'properties.k'"
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("kind", "fields", "param"),
    [
        (
            ChatCompletionRequest,
            {
                "messages": HELLO,
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": BAD}},
            },
            "response_format.json_schema.schema",
        ),
        (
            ChatCompletionRequest,
            {
                "messages": HELLO,
                "tools": [{"type": "function", "function": {"name": "f", "parameters": BAD, "strict": True}}],
            },
            "tools.0.function.parameters",
        ),
        (
            ResponsesRequest,
            {"input": "x", "text": {"format": {"type": "json_schema", "name": "x", "schema": BAD}}},
            "text.format.schema",
        ),
        (
            ResponsesRequest,
            {"input": "x", "tools": [{"type": "function", "name": "f", "parameters": BAD, "strict": True}]},
            "tools.0.parameters",
        ),
        (
            MessagesRequest,
            {
                "messages": HELLO,
                "max_tokens": 1,
                "tools": [{"name": "f", "input_schema": BAD, "strict": True}],
            },
            "tools.0.input_schema",
        ),
        (
            MessagesRequest,
            {
                "messages": HELLO,
                "max_tokens": 1,
                "output_config": {"format": {"type": "json_schema", "schema": BAD}},
            },
            "output_config.format.schema",
        ),
    ],
)
def test_each_dialect_names_its_own_field_and_the_keyword(kind: Any, fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse(kind, json.dumps({"model": "tiny"} | fields).encode())
    assert refused.value.param == param
    assert KEYWORD in refused.value.message
    assert param in refused.value.message


def test_a_tool_that_is_not_strict_may_say_more_than_a_grammar_holds() -> None:
    check_schemas([Schema("tools.0", BAD, "f", strict=False)])


KEYWORDS = (
    "type properties items $ref anyOf allOf minLength maxItems minProperties pattern enum patternProperties "
    "propertyNames format unevaluatedProperties $defs"
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYWORDS),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(st.lists(st.dictionaries(st.sampled_from(["properties", "anyOf", "$ref", "items"]), json_values)))
def test_whatever_the_schemas_are_they_are_taken_or_refused_by_our_error(schemas: list[Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        check(*schemas)
