"""vLLM's fields that restrict an answer are taken within the bounds of JSON Schemas, or refused by name."""

import json
from typing import Any

import pytest

from serve.engine.protocol import JsonFormat, TextFormat
from serve.errors import InvalidRequest
from serve.formats.chat import ChatCompletionRequest
from serve.formats.completions import CompletionRequest
from serve.formats.messages.request import MessagesRequest
from serve.formats.responses.request import ResponsesRequest
from serve.formats.sampling import TAKEN, RequestBounds, parse

LIMITS = RequestBounds(messages=4, n=2, stop_sequences=4, completion_tokens=100, tools=2, prompts=2)
HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
Json = dict[str, Any]


def chat(fields: Json) -> ChatCompletionRequest:
    return parse(ChatCompletionRequest, json.dumps({"model": "tiny", "messages": HELLO} | fields).encode())


def completion(fields: Json) -> CompletionRequest:
    return parse(CompletionRequest, json.dumps({"model": "tiny", "prompt": "Say"} | fields).encode())


def responses(fields: Json) -> ResponsesRequest:
    return parse(ResponsesRequest, json.dumps({"model": "tiny", "input": "Say"} | fields).encode())


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"structured_outputs": {"json": SCHEMA}}, JsonFormat(TEXT)),
        ({"structured_outputs": {"json": TEXT}}, JsonFormat(TEXT)),
        ({"structured_outputs": {"json_object": True}}, JsonFormat()),
        ({"structured_outputs": {"regex": "[a-z]+"}}, TextFormat(regex="[a-z]+")),
        ({"structured_outputs": {"choice": ["yes", "no"], "grammar": None}}, TextFormat(None, ("yes", "no"))),
        ({"guided_json": SCHEMA}, JsonFormat(TEXT)),
        ({"guided_regex": "[a-z]+"}, TextFormat(regex="[a-z]+")),
        ({"guided_choice": ["yes", "no"]}, TextFormat(None, ("yes", "no"))),
    ],
)
def test_what_the_answer_must_be_reaches_the_engine(fields: Json, expected: JsonFormat | TextFormat) -> None:
    for body in (chat(fields), completion(fields)):
        sampling = body.sampling(LIMITS)
        assert (sampling.format or sampling.text_format) == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"another": 1}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "root ::= x"}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": " *"}}, "structured_outputs.whitespace_pattern"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice.0"),
        ({"structured_outputs": {"choice": ["a"] * 1001}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a" * 40_000]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": "no schema"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 513}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a{129}"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "((a{100}){100}){100}"}}, "structured_outputs.regex"),
        ({"guided_regex": "a{129}"}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_json": {"type": "string", "maxLength": 2000}}, "guided_json"),
        ({"guided_grammar": "root ::= x"}, "guided_grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a"}, "guided_choice": ["a"]}, "structured_outputs.regex"),
        ({"guided_regex": "a", "min_tokens": 2}, "min_tokens"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"min_tokens": 11, "max_tokens": 10}, "min_tokens"),
        ({"min_tokens": 101}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stop_token_ids": [1] * 65}, "stop_token_ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ],
)
def test_what_is_too_much_or_not_possible_is_named(fields: Json, param: str) -> None:
    for make in (chat, completion):
        with pytest.raises(InvalidRequest) as wrong:
            make(fields).sampling(LIMITS)
        assert wrong.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_object"}},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)
def test_an_answer_has_one_form(fields: Json) -> None:
    for name, value in (("guided_regex", "a"), ("min_tokens", 1), ("ignore_eos", True)):
        with pytest.raises(InvalidRequest) as wrong:
            chat(fields | {name: value})
        assert wrong.value.param == name
    chat(fields | {"min_tokens": 0, "ignore_eos": False, "stop_token_ids": [5]})


def test_when_an_answer_ends_reaches_the_engine() -> None:
    fields = {"min_tokens": 3, "max_tokens": 9, "ignore_eos": True, "stop_token_ids": [5, 6]}
    for body in (chat(fields), completion(fields)):
        sampling = body.sampling(LIMITS)
        assert (sampling.completion_tokens_min, sampling.completion_tokens_max) == (3, 9)
        assert (sampling.ignore_eos, sampling.stop_token_ids) == (True, (5, 6))


def test_a_completion_may_be_empty_and_a_chat_may_not() -> None:
    assert completion({"max_tokens": 0}).sampling(LIMITS).completion_tokens_max == 0
    assert completion({}).sampling(LIMITS).completion_tokens_max == 16
    with pytest.raises(InvalidRequest):
        chat({"max_tokens": 0})


@pytest.mark.parametrize("name", sorted(TAKEN))
def test_the_other_apis_refuse_vllms_fields_by_name(name: str) -> None:
    message = {"model": "tiny", "messages": HELLO, "max_tokens": 5, name: {"another": "value"}}
    with pytest.raises(InvalidRequest) as wrong:
        parse(MessagesRequest, json.dumps(message).encode())
    assert wrong.value.param == name
    with pytest.raises(InvalidRequest) as wrong:
        responses({name: {"another": "value"}})
    assert wrong.value.param == name


def test_responses_take_chats_sampling_fields() -> None:
    sampling = responses(
        {"seed": 7, "stop": "x", "top_k": 3, "presence_penalty": 0.5, "frequency_penalty": 1}
    ).sampling(LIMITS)
    assert (sampling.seed, sampling.stop, sampling.top_k) == (7, ("x",), 3)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 1.0)
    assert responses({"stop": ["a", "b"]}).sampling(LIMITS).stop == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"top_k": -2}, "top_k"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True}, "echo"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
    ],
)
def test_responses_ignore_no_sampling_field_in_silence(fields: Json, param: str) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        responses(fields).sampling(LIMITS)
    assert wrong.value.param == param


def test_values_that_change_nothing_are_taken_in_responses() -> None:
    fields = {
        "n": 1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "stream_options": {},
        "seed": None,
    }
    assert responses(fields).sampling(LIMITS) == responses({}).sampling(LIMITS)
