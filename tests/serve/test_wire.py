"""Invariant 10: every input has a bound, and breaking it is a clear error with the field's name."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.api.wire import ChatCompletionRequest, CompletionRequest, Limits, parse
from serve.engine.base import Message
from serve.errors import InvalidRequest

LIMITS = Limits(messages=4, n=2, stop_sequences=4, completion_tokens=100)
HELLO = [{"role": "user", "content": "Hello"}]


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
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"cache_salt": "other"}, "cache_salt"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        chat(**fields)
    assert wrong.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 3}, "n"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
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
    asked = chat(
        brand_new=1, user="u", metadata={}, temperature=None, stop=None, n=None, stream=None, tools=[]
    )
    sampling = asked.sampling(LIMITS)
    assert (sampling.temperature, sampling.n, sampling.stop) == (1.0, 1, ())


def test_content_parts_are_joined_and_developer_means_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    assert asked.prompt(LIMITS) == (Message("system", "be brief"), Message("user", "ab"))


def test_the_newer_length_field_wins_and_names_itself_in_errors() -> None:
    asked = chat(max_tokens=5, max_completion_tokens=7)
    assert asked.sampling(LIMITS).completion_tokens_max == 7
    assert asked.length_param == "max_completion_tokens"


def test_a_completion_takes_one_prompt_and_has_openais_default_length() -> None:
    asked = parse(CompletionRequest, b'{"model": "tiny", "prompt": ["Once"]}')
    assert (asked.prompt, asked.sampling(LIMITS).completion_tokens_max) == ("Once", 16)
    with pytest.raises(InvalidRequest):
        parse(CompletionRequest, b'{"model": "tiny", "prompt": ["a", "b"]}')


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
field_names = st.sampled_from([*ChatCompletionRequest.model_fields, "tools", "logit_bias", "echo"])


@given(st.dictionaries(field_names, json_values, max_size=5))
def test_whatever_a_field_holds_it_is_accepted_or_refused_by_our_error(fields: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidRequest):
        asked = chat(**fields)
        asked.prompt(LIMITS)
        asked.sampling(LIMITS)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_accepted_or_refused_by_our_error(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(ChatCompletionRequest, body)
