"""Invariant 10: every input has a bound, and breaking it is a clear error with the field's name."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.engine.protocol import JsonFormat, Message, Texts, Tool, Toolbox, ToolCall
from serve.errors import InvalidRequest
from serve.formats.chat import ChatCompletionRequest
from serve.formats.completions import CompletionRequest
from serve.formats.errors import body_of
from serve.formats.messages.request import MessagesRequest
from serve.formats.responses.items import Ids, input_items, messages
from serve.formats.responses.request import InputMessage, ResponsesRequest
from serve.formats.sampling import HARMFUL, TAKEN, TOP_P_MIN, RequestBounds, parse

LIMITS = RequestBounds(messages=4, n=2, stop_sequences=4, completion_tokens=100, tools=2, prompts=2)
HELLO = [{"role": "user", "content": "Hello"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CALLED = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome"}'}}


def chat(**fields: Any) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({"model": "tiny", "messages": HELLO} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"n": 0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "NaN"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "sunny"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALLED]}]}, "messages.0"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5"),
        ({"logit_bias": {"five": 1}}, "logit_bias.five"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"cache_salt": "other"}, "cache_salt"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        chat(**fields)
    assert wrong.value.param == param
    detail = body_of(wrong.value)["error"]
    assert detail["code"] is not None
    assert "Value error" not in detail["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
    ],
)
def test_a_bound_of_the_installation_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        chat(**fields).sampling(LIMITS)
    assert wrong.value.param == param


def test_too_many_messages_are_refused() -> None:
    with pytest.raises(InvalidRequest) as wrong:
        chat(messages=HELLO * 5).prompt(LIMITS)
    assert wrong.value.param == "messages"


def test_unknown_fields_are_ignored_and_null_means_absent() -> None:
    body = chat(
        brand_new=1, user="u", metadata={}, temperature=None, stop=None, n=None, stream=None, tools=[]
    )
    sampling = body.sampling(LIMITS)
    assert (sampling.temperature, sampling.n, sampling.stop) == (1.0, 1, ())


def test_content_parts_are_joined_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert body.prompt(LIMITS) == (Message("system", "be brief"), Message("user", "ab"))


def test_the_newer_length_field_wins() -> None:
    body = chat(max_tokens=5, max_completion_tokens=7)
    assert body.sampling(LIMITS).completion_tokens_max == 7


@pytest.mark.parametrize("asked", [99, 100, 101, 4096, 2**70])
def test_a_length_above_our_bound_means_our_bound_in_every_dialect(asked: int) -> None:
    most = min(asked, LIMITS.completion_tokens)
    turn = {"model": "tiny", "max_tokens": asked, "messages": HELLO}
    bodies = (
        chat(max_tokens=asked),
        chat(max_completion_tokens=asked),
        completion(prompt="Once", max_tokens=asked),
        parse(MessagesRequest, json.dumps(turn).encode()),
        parse(
            ResponsesRequest, json.dumps({"model": "t", "input": "x", "max_output_tokens": asked}).encode()
        ),
    )
    assert {body.sampling(LIMITS).completion_tokens_max for body in bodies} == {most}


def completion(**fields: Any) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "tiny"} | fields).encode())


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("Once", ("Once",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_a_completion_takes_texts_and_token_ids_and_has_openais_default_length(
    prompt: Any, prompts: Any
) -> None:
    body = completion(prompt=prompt)
    assert body.texts(LIMITS) == Texts(prompts)
    assert body.sampling(LIMITS).completion_tokens_max == 16


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a"] * 3}, "prompt"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        completion(**fields).texts(LIMITS)
    assert wrong.value.param == param


def test_tools_and_their_calls_arrive_as_the_engine_wants_them() -> None:
    turns = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALLED]}]
    turns.append({"role": "tool", "content": "sunny", "tool_call_id": "c1"})
    body = chat(messages=turns, tools=[WEATHER], parallel_tool_calls=False)
    assert body.prompt(LIMITS)[1:] == (
        Message("assistant", None, (ToolCall(0, "c1", "weather", '{"city":"Rome"}'),)),
        Message("tool", "sunny", tool_call_id="c1"),
    )
    tool = Tool("weather", None, json.dumps(CITY, separators=(",", ":")))
    assert body.toolbox(LIMITS) == Toolbox((tool,), "auto", None, parallel=False)
    named = {"type": "function", "function": {"name": "weather"}}
    assert chat(tools=[WEATHER], tool_choice=named).toolbox(LIMITS) == Toolbox((tool,), "required", "weather")


def test_too_many_tools_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": f"f{number}"}} for number in range(3)]
    with pytest.raises(InvalidRequest) as wrong:
        chat(tools=tools).toolbox(LIMITS)
    assert wrong.value.param == "tools"


def test_the_format_of_the_answer_is_json_of_a_schema_or_any_object() -> None:
    assert chat(response_format={"type": "text"}).sampling(LIMITS).format is None
    assert chat(response_format={"type": "json_object"}).sampling(LIMITS).format == JsonFormat()
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    assert chat(response_format=schema).sampling(LIMITS).format == JsonFormat(
        json.dumps(CITY, separators=(",", ":"))
    )


@pytest.mark.parametrize("name", sorted(HARMFUL.keys() - TAKEN))
def test_vllms_own_fields_are_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        chat(**{name: {"another": "value"}})
    assert (wrong.value.param, wrong.value.code) == (name, "unsupported_parameter")
    chat(**{name: None})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([*ChatCompletionRequest.model_fields, "functions", "cache_salt", "audio"])


@given(st.dictionaries(field_names, json_values, max_size=5))
def test_whatever_a_field_holds_it_is_accepted_or_refused_by_our_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        body = chat(**fields)
        body.prompt(LIMITS)
        body.toolbox(LIMITS)
        body.sampling(LIMITS)


@given(st.dictionaries(st.sampled_from(list(CompletionRequest.model_fields)), json_values, max_size=5))
def test_whatever_a_completions_field_holds_it_is_accepted_or_refused_by_our_error(
    fields: dict[str, Any],
) -> None:
    with contextlib.suppress(InvalidRequest):
        body = completion(**fields)
        body.texts(LIMITS)
        body.sampling(LIMITS)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_accepted_or_refused_by_our_error(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatCompletionRequest, body)


def test_a_tools_description_is_bounded_by_the_body_and_the_context_alone() -> None:
    """Servers of the Model Context Protocol describe their tools in 9,000 characters and more."""
    text = "Reads a page. " * 2_000
    function = WEATHER["function"] | {"description": text}  # type: ignore[operator]
    toolbox = chat(tools=[WEATHER | {"function": function}]).toolbox(LIMITS)
    assert toolbox is not None
    assert toolbox.tools[0].description == text
    tool = {"name": "weather", "description": text, "input_schema": CITY}
    message = parse(
        MessagesRequest,
        json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 5, "tools": [tool]}).encode(),
    )
    toolbox = message.toolbox(LIMITS)
    assert toolbox is not None
    assert toolbox.tools[0].description == text


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in HARMFUL.items() for value in values]
)
def test_values_of_vllms_fields_that_change_nothing_are_accepted(name: str, value: object) -> None:
    assert chat(**{name: value}).sampling(LIMITS) == chat().sampling(LIMITS)
    assert completion(prompt="a", **{name: value}).sampling(LIMITS) == completion(prompt="a").sampling(LIMITS)


def test_special_tokens_are_added_to_a_text_and_not_to_a_chat() -> None:
    chat(add_special_tokens=False)
    completion(prompt="a", add_special_tokens=True)
    with pytest.raises(InvalidRequest):
        chat(add_special_tokens=True)
    with pytest.raises(InvalidRequest):
        completion(prompt="a", add_special_tokens=False)


@pytest.mark.parametrize("fields", [{"ignore_eos": 0}, {"use_beam_search": 0}, {"min_tokens": -1}])
def test_a_value_of_another_type_or_size_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        chat(**fields)


def test_a_top_p_of_zero_leaves_the_likeliest_token_in_every_api() -> None:
    respond = json.dumps({"model": "tiny", "input": "Hi", "top_p": 0}).encode()
    message = json.dumps({"model": "tiny", "messages": HELLO, "max_tokens": 5, "top_p": 0}).encode()
    for sampling in (
        chat(top_p=0).sampling(LIMITS),
        completion(prompt="a", top_p=0).sampling(LIMITS),
        parse(ResponsesRequest, respond).sampling(LIMITS),
        parse(MessagesRequest, message).sampling(LIMITS),
    ):
        assert 0 < sampling.top_p <= TOP_P_MIN  # vLLM refuses 0


def test_usage_in_every_chunk_is_refused_and_its_default_is_not() -> None:
    assert chat(
        stream=True, stream_options={"include_usage": True, "continuous_usage_stats": False}
    ).include_usage


def test_an_assistants_refusal_is_the_text_of_its_turn() -> None:
    part = [{"type": "refusal", "refusal": "I cannot."}]
    for turn in ({"refusal": "I cannot."}, {"content": None, "refusal": "I cannot."}, {"content": part}):
        body = chat(messages=[*HELLO, {"role": "assistant"} | turn, *HELLO])
        assert body.prompt(LIMITS)[1] == Message("assistant", "I cannot.")
    answered = {"role": "assistant", "content": "Yes.", "refusal": None}
    assert chat(messages=[*HELLO, answered]).prompt(LIMITS)[1] == Message("assistant", "Yes.")
    for turn in ({"content": "x", "refusal": "no"}, {"content": part}):
        with pytest.raises(InvalidRequest):
            chat(messages=[{"role": "user"} | turn])


def test_an_assistants_refusal_is_taken_by_the_responses_api() -> None:
    content = [{"type": "refusal", "refusal": "I cannot."}]

    def sent(role: str) -> ResponsesRequest:
        item = {"type": "message", "role": role, "content": content}
        return parse(ResponsesRequest, json.dumps({"model": "tiny", "input": [item]}).encode())

    (item,) = sent("assistant").input
    assert isinstance(item, InputMessage)
    assert item.text == "I cannot."
    with pytest.raises(InvalidRequest, match="only an assistant"):
        sent("user")


@pytest.mark.parametrize("arguments", ["", '{"city": "Os', "no JSON", "[]"])
def test_an_earlier_call_may_hold_any_arguments_in_chat_and_responses(arguments: str) -> None:
    """A call that a limit has cut is sent back as it was answered."""
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    turns = chat(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}, result]).prompt(LIMITS)
    item = {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": arguments}
    body = {"model": "tiny", "input": [item], "store": False}
    parsed = parse(ResponsesRequest, json.dumps(body).encode())
    items = input_items(parsed.input, Ids("req_1"), {}, ())
    for turn in (turns[1], *messages(items, None)):
        assert [call.arguments for call in turn.tool_calls] == [arguments]
