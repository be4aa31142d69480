"""One grammar library for all: the order of requests never matters, and what it cannot do is a 400."""

import asyncio
import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.engine.protocol import GenerationRequest, JsonFormat, Message, Sampling, Tool, Toolbox
from serve.engine.vllm.grammar_process import Grammar, Verdict
from serve.engine.vllm.grammar_worker import CPU_S_MAX
from serve.engine.vllm.grammars import GRAMMAR_BACKEND, check_grammar
from serve.errors import EngineUnavailable, InvalidRequest
from serve.formats.schema_budget import Schema, check_schemas
from serve.formats.schema_support import FORMATS, unsupported
from tests.support.engine_host import Answer, EngineHost, collect, events_of

pytestmark = pytest.mark.slow

COMPILED_BYTES_MAX = 32 * 1024 * 1024  # counted, so the same on every machine; the dearest is 20
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


class FixedGate:
    """Gives every grammar the same verdict."""

    def __init__(self, verdict: Verdict) -> None:
        self._verdict = verdict

    async def verdict(self, tenant: str, grammar: Grammar) -> Verdict:
        return self._verdict


@pytest.mark.parametrize(
    ("tools", "verdict", "param", "code"),
    [
        (1, Verdict(too_complex=True), "tools.0.function.parameters", "schema_too_complex"),
        (2, Verdict(too_complex=True), "tools", "schema_too_complex"),
        (2, Verdict(error="[00:00:00] /a/b.cc:7: no good", schema=1), "tools.1.function.parameters", None),
        (0, Verdict(too_complex=True), FORMAT_PARAM, "schema_too_complex"),
    ],
)
def test_a_refusal_names_the_tool_or_the_field(
    tools: int, verdict: Verdict, param: str, code: str | None
) -> None:
    from vllm.sampling_params import StructuredOutputsParams

    offered = tuple(
        Tool(f"tool{number}", None, json.dumps(LENGTH), None, f"tools.{number}.function.parameters")
        for number in range(tools)
    )
    format = None if tools else JsonFormat(json.dumps(LENGTH), FORMAT_PARAM)
    request = GenerationRequest(
        "r", None, HELLO, Sampling(format=format), "acme", toolbox=Toolbox(offered) if tools else None
    )
    params = [SimpleNamespace(structured_outputs=StructuredOutputsParams(json=LENGTH))]
    gate: Any = FixedGate(verdict)
    with pytest.raises(InvalidRequest) as refused:
        asyncio.run(check_grammar(gate, request, params))
    assert (refused.value.param, refused.value.code) == (param, code or "invalid_value")
    assert f"'{param}'" in refused.value.message
    if param.startswith("tools."):
        assert f"'tool{tools - 1}'" in refused.value.message
    if verdict.error:
        assert refused.value.message.endswith("a grammar: no good")


# Within the budget, because a few of them are common, and half a minute of CPU for this tokenizer.
URIS = {
    "type": "object",
    "properties": {f"k{number}": {"type": "string", "format": "uri"} for number in range(500)},
}


def test_a_schema_that_takes_too_long_is_named_and_the_engine_goes_on(host: EngineHost) -> None:
    check_schemas([Schema(FORMAT_PARAM, URIS)])
    for _ in range(5):
        with pytest.raises((InvalidRequest, EngineUnavailable)) as of_format:
            answer(host, "slow-format", schema=URIS)
        if isinstance(of_format.value, InvalidRequest):
            break  # else the machine had no time for it
    assert (of_format.value.code, of_format.value.param) == ("schema_too_complex", FORMAT_PARAM)
    counts = host.engine._grammar_gate.counts
    assert counts.too_complex > 0
    with pytest.raises(InvalidRequest):  # known by now
        answer(host, "slow-again", schema=URIS)
    assert host.engine._grammar_gate.counts == counts
    assert len(json.loads(answer(host, "after", schema=LENGTH).text)["k"]) <= 3


@pytest.mark.parametrize(
    "schema",
    [
        strings(1000, 500, 255),
        strings(*range(16, 32)),
        strings(*[200] * 100),
        {"type": "string", "pattern": "^(([a-z]{1,6}x){1,7}y){1,7}$"},
        {"type": "object", "properties": {f"k{number}": {"type": "string"} for number in range(600)}},
        {"type": "object", "properties": {f"k{number}": {} for number in range(49)}, "maxProperties": 50},
        {"enum": [f"value {number}" for number in range(1600)]},
    ],
    ids=["lengths", "different lengths", "same length", "pattern", "optional", "counted", "enum"],
)
def test_the_dearest_schemas_that_are_allowed_are_small_or_refused_in_time(
    host: EngineHost, schema: dict[str, Any]
) -> None:
    check_schemas([Schema(FORMAT_PARAM, schema)])
    text = json.dumps(schema)
    # A busy machine needs more CPU for the same work, so a verdict near the limit is either.
    try:
        verdict = host.run(host.engine._grammar_gate.verdict("dear", Grammar("json", text, (text,))))
    except EngineUnavailable:  # a machine that has no time says so
        return
    assert verdict.error is None
    assert verdict.bytes < COMPILED_BYTES_MAX
    assert verdict.cpu_s < CPU_S_MAX + 1
