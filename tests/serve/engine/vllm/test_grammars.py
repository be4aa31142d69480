"""One grammar library for all: the order of requests never matters, and what it cannot do is a 400."""

import itertools
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.protocol import GenerationRequest, JsonFormat, Message, Sampling, Tool, Toolbox
from serve.engine.vllm.grammars import GRAMMAR_BACKEND
from serve.errors import InvalidRequest
from serve.formats.schema_budget import Schema, check_schemas
from serve.formats.schema_support import FORMATS, unsupported
from tests.support.engine_host import Answer, EngineHost, collect, events_of

COMPILED_BYTES_MAX = 32 * 1024 * 1024  # counted, so the same on every machine; the dearest is 20
COMPILE_CPU_S_MAX = 90.0  # about 4 on an idle machine, 17 were seen on a busy one
HELLO = (Message("user", "Hello"),)
# With the library left to the first request, this made it another one than tools need.
PATTERN_AND_LENGTH = {
    "type": "object",
    "properties": {"k": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}},
    "required": ["k"],
}
LENGTH = {"type": "object", "properties": {"k": {"type": "string", "maxLength": 3}}, "required": ["k"]}
_numbers = itertools.count()
FORMAT_PARAM, TOOL_PARAM = "response_format.json_schema.schema", "tools.0.function.parameters"


def answer(
    host: EngineHost, name: str, *, schema: Any = None, tool: Any = None, choice: str = "auto"
) -> Answer:
    number = f"{name}-{next(_numbers)}"  # a request's id is used once
    format = None if schema is None else JsonFormat(json.dumps(schema), FORMAT_PARAM)
    offered = None if tool is None else Tool("forecast", None, json.dumps(tool), None, TOOL_PARAM)
    toolbox = None if offered is None else Toolbox((offered,), choice)
    sampling = Sampling(completion_tokens_max=40, temperature=0.0, format=format)
    request = GenerationRequest(number, None, HELLO, sampling, number, toolbox=toolbox)
    return host.run(collect(events_of(host.engine, request)))


@pytest.mark.parametrize("order", [("format", "tools"), ("tools", "format")])
def test_the_order_of_requests_never_matters(host: EngineHost, order: tuple[str, str]) -> None:
    for turn, kind in enumerate(order * 2):
        number = f"order-{'-'.join(order)}-{turn}"
        if kind == "tools":
            for choice in ("auto", "required"):
                assert answer(host, f"{number}-{choice}", tool=LENGTH, choice=choice).finished.failed is False
            continue
        # What the gateway refuses, sent past it.
        with pytest.raises(InvalidRequest):
            answer(host, number, schema=PATTERN_AND_LENGTH)
        assert len(json.loads(answer(host, f"{number}-length", schema=LENGTH).text)["k"]) <= 3


def test_the_library_is_loaded_before_the_first_request(host: EngineHost) -> None:
    config = host.engine._llm.vllm_config.structured_outputs_config
    assert (config.backend, config.disable_any_whitespace) == (GRAMMAR_BACKEND, True)


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "wat"}, 'Unsupported type "wat"'),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength 3 is greater than maxLength 2"),
        ({"type": "string", "pattern": "(("}, "parenthesis is not closed"),
        ({"enum": []}, "enum array must not be empty"),
    ],
)
def test_a_schema_that_does_not_compile_is_named_with_the_reason(
    host: EngineHost, schema: dict[str, Any], reason: str
) -> None:
    inside = {"type": "object", "properties": {"k": schema}, "required": ["k"]}
    with pytest.raises(InvalidRequest) as of_format:
        answer(host, "wrong-format", schema=inside)
    assert of_format.value.param == FORMAT_PARAM
    assert reason in of_format.value.message
    assert "/project/" not in of_format.value.message
    for choice in ("auto", "required"):
        with pytest.raises(InvalidRequest) as of_tool:
            answer(host, "wrong-tool", tool=inside, choice=choice)
        assert of_tool.value.param == TOOL_PARAM
        assert "'forecast'" in of_tool.value.message
        assert reason in of_tool.value.message
    assert answer(host, "not-called", tool=inside, choice="none").finished.failed is False


kinds = st.sampled_from(["string", "integer", "number", "array", "object", "null"])
leaves: dict[str, st.SearchStrategy[Any]] = {
    "type": kinds | st.lists(kinds, min_size=1, max_size=2),
    "pattern": st.just("^a$"),
    "format": st.sampled_from([*sorted(FORMATS), "colour", "regex"]),
    "minLength": st.just(1),
    "maxLength": st.just(2),
    "multipleOf": st.just(2),
    "uniqueItems": st.booleans(),
    "contains": st.just({}),
    "minContains": st.just(1),
}


def deeper(schemas: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from(["a", "type", "format"]), schemas, max_size=2)
    keys = leaves | {
        "properties": named,
        "patternProperties": named,
        "propertyNames": schemas,
        "unevaluatedProperties": st.booleans(),
        "items": schemas,
        "allOf": st.lists(schemas, min_size=1, max_size=2),
        "anyOf": st.lists(schemas, min_size=1, max_size=2),
        "$defs": named,
    }
    return st.fixed_dictionaries({}, optional=keys)


@settings(deadline=None)
@given(st.recursive(st.fixed_dictionaries({}, optional=leaves), deeper, max_leaves=4))
def test_whatever_vllm_refuses_is_refused_here_by_name(schema: dict[str, Any]) -> None:
    from vllm.v1.structured_output.backend_xgrammar import has_xgrammar_unsupported_json_features

    if has_xgrammar_unsupported_json_features(schema):
        assert unsupported(schema) is not None


def strings(*lengths: int) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            f"k{index}": {"type": "string", "maxLength": length} for index, length in enumerate(lengths)
        },
    }


@pytest.mark.parametrize(
    "schema",
    [
        strings(1000, 500, 255, 128),
        strings(*range(24, 40)),
        strings(*[200] * 100),
        {"type": "string", "pattern": "^(([a-z]{1,8}x){1,7}y){1,7}$"},
        {"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(600)}},
        {"type": "object", "properties": {f"k{number}": {} for number in range(49)}, "maxProperties": 50},
        {"enum": [f"value {number}" for number in range(1600)]},
    ],
    ids=["lengths", "different lengths", "same length", "pattern", "optional", "counted", "enum"],
)
def test_the_dearest_schemas_that_are_allowed_compile_in_bounded_memory_and_cpu_time(
    host: EngineHost, schema: dict[str, Any]
) -> None:
    import xgrammar

    check_schemas([Schema(FORMAT_PARAM, schema)])
    tokenizer = host.engine._renderer.tokenizer
    compiler = xgrammar.GrammarCompiler(
        xgrammar.TokenizerInfo.from_huggingface(tokenizer), max_threads=1, cache_enabled=False
    )
    start = time.process_time()
    compiled = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=(",", ":"))
    cpu_s = time.process_time() - start
    assert compiled.memory_size_bytes < COMPILED_BYTES_MAX
    assert cpu_s < COMPILE_CPU_S_MAX
