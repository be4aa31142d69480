"""POST /v1/messages answers what the types of Anthropic's own client accept (it comes with vLLM)."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from anthropic.types import Message as AnthropicClientMessage
from anthropic.types import RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from serve.billing.ledger.ledger import Ledger
from serve.engine.protocol import Delta, JsonFormat, Message, Tool, ToolCall
from serve.errors import BespokeError, EngineUnavailable, InvalidRequest
from serve.formats.errors import anthropic_body_of
from serve.formats.messages.objects import AnthropicError, AnthropicMessage
from serve.formats.messages.request import MessagesRequest
from serve.formats.sampling import RequestBounds, parse
from tests.serve.api.test_errors import EXAMPLES
from tests.support.scripted_app import BROKEN, HELLO, LEFT, Json, ScriptedApp, says

PATH = "/v1/messages"
ASK: Json = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "Hello"}]}
EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
WEATHER: Json = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = says(
    Delta(0, "Let me see.", 2),
    Delta(0, "", 1, tool_calls=(ToolCall(0, "call_1", "weather", ""),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments='{"city":'),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments='"Oslo"}'),)),
    Delta(0, "", 1, "tool_calls", tool_calls=(ToolCall(1, "call_2", "weather", "{}"),)),
)


def checked(body: Json) -> AnthropicClientMessage:
    AnthropicMessage.model_validate(body, extra="forbid")
    return AnthropicClientMessage.model_validate(body)


def checked_events(events: list[Json]) -> list[Json]:
    for event in events:
        EVENT.validate_python(event)
    return events


def refused(played: ScriptedApp, status: int, body: Json, **headers: str) -> Json:
    answer = played.ask("POST", PATH, body, **headers)
    assert answer.status_code == status, answer.text
    AnthropicError.model_validate(answer.json(), extra="forbid")
    error: Json = answer.json()["error"]
    return error


def test_a_text_is_answered_and_billed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    body = played.say(PATH, ASK | {"metadata": {"user_id": "u"}})
    message = checked(body)
    assert [(block.type, block.text) for block in message.content] == [("text", "Hello")]  # type: ignore[union-attr]
    assert (message.stop_reason, message.role) == ("end_turn", "assistant")
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (6, 4, 2)
    assert played.bills() == [("acme", "complete", 10, 4, 2)]
    (request,) = played.engine.requests
    assert request.prompt == (Message("user", "Hello"),)
    assert (request.sampling.completion_tokens_max, request.collect) == (5, True)


def test_a_stream_has_anthropics_events(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    events = checked_events(played.stream(PATH, ASK))
    assert [event["type"] for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert (
        "".join(event["delta"]["text"] for event in events if "index" in event and "delta" in event)
        == "Hello"
    )
    # What the cache saved is known at the end, which may have come already.
    assert events[0]["message"]["usage"]["input_tokens"] in (6, 10)
    assert events[-2]["delta"]["stop_reason"] == "end_turn"
    assert (events[-2]["usage"]["input_tokens"], events[-2]["usage"]["output_tokens"]) == (6, 2)
    assert played.bills() == [("acme", "complete", 10, 4, 2)]


def test_tool_uses_are_blocks_whole_and_streamed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS)
    message = checked(played.say(PATH, ASK | {"tools": [WEATHER]}))
    assert message.stop_reason == "tool_use"
    assert [block.model_dump(exclude_unset=True) for block in message.content] == [
        {"type": "text", "text": "Let me see."},
        {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Oslo"}},
        {"type": "tool_use", "id": "call_2", "name": "weather", "input": {}},
    ]
    events = checked_events(played.stream(PATH, ASK | {"tools": [WEATHER]}))
    pieces = [
        (e["index"], e["delta"].get("partial_json")) for e in events if e["type"] == "content_block_delta"
    ]
    assert pieces == [(0, None), (1, '{"city":'), (1, '"Oslo"}'), (2, "{}")]
    marks = [
        (e["type"][14:], e["index"]) for e in events if e["type"].endswith(("block_start", "block_stop"))
    ]
    assert marks == [(kind, index) for index in range(3) for kind in ("start", "stop")]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None, True)),
        ({"type": "auto", "disable_parallel_tool_use": True}, ("auto", None, False)),
        ({"type": "any"}, ("required", None, True)),
        ({"type": "none"}, ("none", None, True)),
        ({"type": "tool", "name": "weather"}, ("required", "weather", True)),
    ],
)
def test_tools_and_their_choice_reach_the_engine(tmp_path: Path, choice: Any, expected: Any) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    played.say(PATH, ASK | {"tools": [WEATHER], "tool_choice": choice})
    toolbox = played.engine.requests[0].toolbox
    assert toolbox is not None
    assert (toolbox.choice, toolbox.function, toolbox.parallel) == expected
    schema = '{"type":"object","properties":{"city":{"type":"string"}}}'
    assert toolbox.tools == (Tool("weather", "The weather in a city.", schema),)


def test_a_conversation_with_tool_results_reaches_the_engine(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    ephemeral = {"cache_control": {"type": "ephemeral"}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Weather", **ephemeral}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Oslo"}},
                {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "sun"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be ", **ephemeral}, {"type": "text", "text": "brief."}]
    played.say(PATH, ASK | {"messages": turns, "system": system, "tools": [WEATHER]})
    assert played.engine.requests[0].prompt == (
        Message("system", "Be brief."),
        Message("user", "Weather"),
        Message(
            "assistant",
            "Let me see.",
            (ToolCall(0, "a", "weather", '{"city": "Oslo"}'), ToolCall(1, "b", "weather", "{}")),
        ),
        Message("tool", "rain", tool_call_id="a"),
        Message("tool", "sun", tool_call_id="b"),
        Message("user", "Well?"),
    )


def test_sampling_and_format_reach_the_engine(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    output = {"format": {"type": "json_schema", "schema": {"type": "object"}}, "effort": "max"}
    body = {"temperature": 0, "top_p": 0.5, "top_k": 7, "stop_sequences": ["x"], "output_config": output}
    played.say(PATH, ASK | body)
    (request,) = played.engine.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.stop) == (0, 0.5, 7, ("x",))
    assert sampling.format == JsonFormat('{"type":"object"}')
    assert request.reasoning_effort == "xhigh"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ('{"ci', {}),
        ('{"city": "Os', {}),
        ('{"city": "Oslo", "days": [1, 2', {"city": "Oslo", "days": [1, 2]}),
        ("no JSON", {"INVALID_JSON": "no JSON"}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        ('{"n": ' + "9" * 5000 + "}", {"INVALID_JSON": '{"n": ' + "9" * 5000 + "}"}),
    ],
)
def test_a_call_that_is_cut_holds_what_was_said_so_far(
    tmp_path: Path, arguments: str, expected: Json
) -> None:
    cut = Delta(0, "", 1, "length", tool_calls=(ToolCall(0, "a", "weather", arguments),))
    message = checked(ScriptedApp(tmp_path, says(cut)).say(PATH, ASK | {"tools": [WEATHER]}))
    assert message.stop_reason == "max_tokens"
    assert message.content[0].input == expected  # type: ignore[union-attr]


def test_an_answer_that_says_nothing_has_no_blocks(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, says(Delta(0, "", 1, "stop")))
    assert checked(played.say(PATH, ASK)).content == []
    assert [event["type"] for event in checked_events(played.stream(PATH, ASK))] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [*ASK["messages"], {"role": "assistant", "content": "I"}]}, "assistant"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "zz"}]}]},
            "'zz'",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}
                ]
            },
            "tool_use",
        ),
        ({"temperature": 1.5}, "temperature"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [WEATHER, WEATHER]}, "same name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type"),
        ({"mcp_servers": [{"name": "m"}]}, "mcp_servers"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
    ],
)
def test_what_is_wrong_or_lacking_is_refused_by_name(tmp_path: Path, fields: Json, named: str) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    error = refused(played, 400, ASK | fields)
    assert error["type"] == "invalid_request_error"
    assert named in error["message"]
    assert not played.engine.requests


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "name", "text", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
LIMITS = RequestBounds(messages=4, n=2, stop_sequences=4, completion_tokens=100, tools=4, prompts=4)


@given(
    st.dictionaries(st.sampled_from([*MessagesRequest.model_fields, "container"]), json_values, max_size=5)
)
def test_whatever_a_field_holds_it_is_accepted_or_refused_by_our_error(fields: Json) -> None:
    with contextlib.suppress(InvalidRequest):
        body = parse(MessagesRequest, json.dumps(ASK | fields).encode())
        body.prompt(LIMITS)
        body.sampling(LIMITS)
        body.toolbox(LIMITS)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_every_error_has_anthropics_shape_and_tells_no_secret(error: BespokeError) -> None:
    body = anthropic_body_of(error)
    AnthropicError.model_validate(body, extra="forbid")
    assert body["error"]["message"]
    assert "secret" not in body["error"]["message"]


def test_errors_before_the_answer_have_anthropics_shape(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, [EngineUnavailable()])
    assert refused(played, 503, ASK)["type"] == "overloaded_error"
    assert refused(played, 503, ASK | {"stream": True})["type"] == "overloaded_error"
    assert refused(played, 404, ASK | {"model": "other"})["type"] == "not_found_error"
    assert refused(played, 401, ASK, authorization="Bearer no")["type"] == "authentication_error"
    wrong = played.ask("GET", PATH)
    assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
    assert "type" not in played.ask("GET", "/v1/nothing").json()
    assert not played.bills()


def test_a_tenant_without_credit_hears_of_its_bill(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    Ledger(played.store).open_account("acme", 0)
    assert refused(played, 429, ASK)["type"] == "billing_error"


def test_an_error_in_the_stream_is_its_last_event_and_what_came_is_billed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, BROKEN)
    events = played.stream(PATH, ASK)
    AnthropicError.model_validate(events[-1], extra="forbid")
    assert events[-1]["error"]["type"] == "api_error"
    assert played.bills() == [("acme", "failed", 10, 0, 1)]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_pays_for_what_was_generated(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, LEFT)
    came = played.leave(PATH, ASK | {"stream": stream}, after=b'"text":"Hel"' if stream else b"")
    assert b"message_stop" not in came
    assert played.bills() == [("acme", "disconnected", 10, 4, 3)]


def test_a_request_that_is_sent_again_gets_the_same_message_and_is_billed_once(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first, second = (played.ask("POST", PATH, ASK, **{"idempotency-key": "k"}) for _ in range(2))
    assert first.json() == second.json()
    assert len(played.bills()) == 1


def test_the_official_client_reads_it_with_a_key_of_its_own_kind(tmp_path: Path) -> None:
    import anthropic
    import httpx2

    played = ScriptedApp(tmp_path, CALLS)

    async def scenario() -> None:
        transport = httpx2.ASGITransport(played.app)
        async with anthropic.AsyncAnthropic(
            api_key=played.keys["acme"],
            base_url="http://here",
            http_client=httpx2.AsyncClient(transport=transport),
            max_retries=0,
        ) as client:
            body: Any = ASK | {"tools": [WEATHER]}
            whole = await client.messages.create(**body)
            async with client.messages.stream(**body) as stream:
                streamed = await stream.get_final_message()
            assert [block.type for block in whole.content] == ["text", "tool_use", "tool_use"]
            assert streamed.to_dict()["content"] == whole.to_dict()["content"]
            assert streamed.usage.input_tokens == whole.usage.input_tokens == 6
            assert whole._request_id is not None
            assert whole._request_id.startswith("req_")
            with pytest.raises(anthropic.NotFoundError, match="does not exist"):
                await client.messages.create(**body | {"model": "other"})

    played.run(scenario())
    assert len(played.bills()) == 2
