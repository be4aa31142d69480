"""POST /v1/responses answers what the types of OpenAI's own client accept."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from serve.engine.protocol import Delta, JsonFormat, Message, TokenLogprob, Tool, ToolCall
from serve.errors import EngineUnavailable, InvalidRequest, ItemNotFound
from serve.formats.responses.items import Ids, input_items, messages
from serve.formats.responses.objects import ResponseObject
from serve.formats.responses.request import ResponsesRequest
from serve.formats.sampling import RequestBounds, parse
from tests.support.scripted_app import ACCEPTED, BROKEN, FINISHED, HELLO, LEFT, Json, ScriptedApp, says

PATH = "/v1/responses"
ASK: Json = {"model": "tiny", "input": "Hello"}
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER: Json = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
CALLS = says(
    Delta(0, "Let me see.", 2),
    Delta(0, "", 1, tool_calls=(ToolCall(0, "call_1", "weather", ""),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments='{"city":'),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments='"Oslo"}'),)),
    Delta(0, "", 1, "tool_calls", tool_calls=(ToolCall(1, "call_2", "weather", "{}"),)),
)


def checked(body: Json) -> Response:
    """Valid by our own description and by OpenAI's types."""
    ResponseObject.model_validate(body)
    return Response.model_validate(body)


def checked_events(events: list[Json]) -> list[Json]:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event)
        if "response" in event:
            checked(event["response"])
    return events


def test_a_text_is_answered_and_billed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    response = checked(played.say(PATH, ASK | {"metadata": {"a": "b"}, "user": "u", "temperature": 0.5}))
    assert (response.output_text, response.status) == ("Hello", "completed")
    assert (response.metadata, response.user, response.temperature) == ({"a": "b"}, "u", 0.5)
    usage = response.usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens, usage.total_tokens) == (10, 2, 12)
    assert usage.input_tokens_details.cached_tokens == 4
    assert played.bills() == [("acme", "complete", 10, 4, 2)]
    (request,) = played.engine.requests
    assert request.prompt == (Message("user", "Hello"),)
    assert request.collect


def test_a_stream_has_openais_events_and_ends_with_what_is_answered_whole(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    events = checked_events(played.stream(PATH, ASK))
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert "".join(event["delta"] for event in events if event["type"].endswith("delta")) == "Hello"
    assert events[2]["item"]["content"] == []
    streamed, whole = events[-1]["response"], played.say(PATH, ASK)
    assert streamed["usage"] == whole["usage"]
    assert streamed["output"][0]["content"] == whole["output"][0]["content"]
    assert played.bills() == [("acme", "complete", 10, 4, 2)] * 2


def test_calls_are_items_whole_and_streamed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS)
    body = ASK | {"tools": [WEATHER], "parallel_tool_calls": True}
    whole = checked(played.say(PATH, body))
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    calls = [item for item in whole.output if item.type == "function_call"]
    assert [(call.call_id, call.name, call.arguments) for call in calls] == [
        ("call_1", "weather", '{"city":"Oslo"}'),
        ("call_2", "weather", "{}"),
    ]
    events = checked_events(played.stream(PATH, body))
    deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert [(event["output_index"], event["delta"]) for event in deltas] == [
        (1, '{"city":'),
        (1, '"Oslo"}'),
        (2, "{}"),
    ]
    done = [event["arguments"] for event in events if event["type"].endswith("arguments.done")]
    assert done == ['{"city":"Oslo"}', "{}"]
    plain = [{**item, "id": ""} for item in events[-1]["response"]["output"]]
    assert plain == [{**item, "id": ""} for item in whole.model_dump(exclude_unset=True)["output"]]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ("auto", None)),
        ("none", ("none", None)),
        ("required", ("required", None)),
        ({"type": "function", "name": "weather"}, ("required", "weather")),
    ],
)
def test_tools_and_their_choice_reach_the_engine(tmp_path: Path, choice: Any, expected: Any) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    checked(played.say(PATH, ASK | {"tools": [WEATHER], "tool_choice": choice}))
    toolbox = played.engine.requests[0].toolbox
    assert toolbox is not None
    assert (toolbox.choice, toolbox.function) == expected
    schema = json.dumps(WEATHER["parameters"], separators=(",", ":"))
    assert toolbox.tools == (Tool("weather", "The weather in a city.", schema),)


def test_an_answer_with_calls_can_be_sent_back_with_their_outputs(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS, HELLO)
    first = played.say(PATH, ASK | {"tools": [WEATHER]})
    outputs = [
        {"type": "function_call_output", "call_id": "call_1", "output": "rain"},
        {
            "type": "function_call_output",
            "call_id": "call_2",
            "output": [{"type": "input_text", "text": "sun"}],
        },
    ]
    question = {"role": "user", "content": [{"type": "input_text", "text": "Hello"}]}
    developer = {"role": "developer", "content": "Be brief."}
    items = [developer, question, {"type": "reasoning", "summary": []}, *first["output"], *outputs]
    checked(played.say(PATH, {"model": "tiny", "input": items, "instructions": "Be kind."}))
    calls = (ToolCall(0, "call_1", "weather", '{"city":"Oslo"}'), ToolCall(1, "call_2", "weather", "{}"))
    assert played.engine.requests[1].prompt == (
        Message("system", "Be kind."),
        Message("system", "Be brief."),
        Message("user", "Hello"),
        Message("assistant", "Let me see.", calls),
        Message("tool", "rain", tool_call_id="call_1"),
        Message("tool", "sun", tool_call_id="call_2"),
    )


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, JsonFormat()),
        (
            {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True},
            JsonFormat('{"type":"object"}'),
        ),
    ],
)
def test_the_format_of_the_text_reaches_the_engine(tmp_path: Path, wanted: Json, expected: Any) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    body = played.say(PATH, ASK | {"text": {"format": wanted}})
    checked(body)
    assert body["text"]["format"] == wanted
    assert played.engine.requests[0].sampling.format == expected


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"include": ["message.output_text.logprobs"]}, 0), ({"top_logprobs": 2}, 2), ({}, None)],
)
def test_logprobs_are_answered_on_request(tmp_path: Path, body: Json, expected: int | None) -> None:
    logprobs = (TokenLogprob(b"Hi", -0.5, ((b"Hi", -0.5), (b"Ho", -1.5))),)
    half = (TokenLogprob(b"!", -0.25),)
    script = says(
        Delta(0, "Hi", 1, logprobs=logprobs), Delta(0, "", 1, logprobs=half), Delta(0, "!", 0, "stop")
    )
    played = ScriptedApp(tmp_path, script)
    part = checked(played.say(PATH, ASK | body)).output[0].content[0]  # type: ignore[union-attr]
    assert played.engine.requests[0].sampling.logprobs == expected
    assert [(one.token, one.logprob) for one in part.logprobs] == [("Hi", -0.5), ("!", -0.25)]  # type: ignore[union-attr]
    assert [one.token for one in part.logprobs[0].top_logprobs] == ["Hi", "Ho"]  # type: ignore[union-attr]
    events = checked_events(played.stream(PATH, ASK | body))
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [[one["token"] for one in logprobs] for logprobs in deltas] == [["Hi"], ["!"]]


def test_reasoning_is_an_item_of_its_own(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, says(Delta(0, "", 1, reasoning="Hm."), Delta(0, "Yes", 1, "stop")))
    body = ASK | {"reasoning": {"effort": "low"}}
    response = checked(played.say(PATH, body))
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.output[0].content[0].text, response.output_text) == ("Hm.", "Yes")  # type: ignore[union-attr,index]
    assert played.engine.requests[0].reasoning_effort == "low"
    events = checked_events(played.stream(PATH, body))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[2:8] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_grows_too_long_is_incomplete(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, says(Delta(0, "Hel", 1), Delta(0, "lo", 1, "length")))
    body = ASK | {"max_output_tokens": 2}
    if stream:
        events = checked_events(played.stream(PATH, body))
        assert events[-1]["type"] == "response.incomplete"
        response = checked(events[-1]["response"])
    else:
        response = checked(played.say(PATH, body))
    assert response.status == response.output[0].status == "incomplete"  # type: ignore[union-attr]
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert played.engine.requests[0].sampling.completion_tokens_max == 2


def test_an_answer_that_says_nothing_is_an_empty_message(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, says(Delta(0, "", 1, "stop")))
    assert checked(played.say(PATH, ASK)).output_text == ""
    assert checked_events(played.stream(PATH, ASK))[-1]["response"]["output"][0]["content"][0]["text"] == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": None}, "model"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"type": "computer_call", "id": "c_1"}]}, "input"),
        ({"input": [{"type": "item_reference"}]}, "input.0.id"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": [{"role": "robot", "content": ""}]}, "input.0.role"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, "input"),
        ({"input": [{"role": "user", "content": "x"}] * 257}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"tools": [{"type": "wed_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"include": ["reasoning.thoughts"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"cache_salt": "other"}, "cache_salt"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"previous_response_id": "resp_none"}, "previous_response_id"),
    ],
)
def test_what_is_wrong_or_lacking_is_refused_by_name(tmp_path: Path, fields: Json, param: str) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    answer = played.ask("POST", PATH, ASK | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert not played.engine.requests
    assert not played.bills()


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
    st.dictionaries(st.sampled_from([*ResponsesRequest.model_fields, "background"]), json_values, max_size=5)
)
def test_whatever_a_field_holds_it_is_accepted_or_refused_by_our_error(fields: Json) -> None:
    with contextlib.suppress(InvalidRequest):
        body = parse(ResponsesRequest, json.dumps(ASK | fields).encode())
        with contextlib.suppress(ItemNotFound):
            messages(input_items(body.input, Ids("req_1"), {}, ()), body.instructions)
        body.sampling(LIMITS)
        body.toolbox(LIMITS)


def test_unknown_fields_and_empty_wishes_are_ignored(tmp_path: Path) -> None:
    fields = {"brand_new": 1, "truncation": "disabled", "background": False, "include": [], "tools": []}
    nulls = dict.fromkeys(("instructions", "text", "reasoning", "store", "metadata", "stream", "tool_choice"))
    checked(ScriptedApp(tmp_path, HELLO).say(PATH, ASK | fields | nulls))


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_answer_is_a_status(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, [EngineUnavailable()])
    answer = played.ask("POST", PATH, ASK | {"stream": stream})
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "service_unavailable"
    assert played.ask("POST", PATH, ASK | {"model": "other"}).status_code == 404
    assert not played.bills()


def test_an_error_in_the_stream_is_its_last_event_and_what_came_is_billed(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, BROKEN)
    events = checked_events(played.stream(PATH, ASK))
    assert events[-1]["type"] == "response.failed"
    response = checked(events[-1]["response"])
    assert (response.status, response.output_text, response.output[0].status) == (  # type: ignore[union-attr]
        "failed",
        "Hel",
        "incomplete",
    )
    assert response.error is not None
    assert response.error.code == "server_error"
    assert played.bills() == [("acme", "failed", 10, 0, 1)]
    assert played.ask("GET", f"{PATH}/{response.id}").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_pays_for_what_was_generated(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, LEFT)
    came = played.leave(PATH, ASK | {"stream": stream}, after=b'"delta":"Hel"' if stream else b"")
    assert b"response.completed" not in came
    assert played.bills() == [("acme", "disconnected", 10, 4, 3)]


def test_a_request_that_is_sent_again_gets_the_same_response_and_is_billed_once(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    headers = {"idempotency-key": "k"}
    first, second = (played.ask("POST", PATH, ASK, **headers) for _ in range(2))
    assert first.json() == second.json()
    assert second.headers["idempotency-replayed"] == "true"
    assert len(played.bills()) == 1
    assert played.ask("GET", f"{PATH}/{first.json()['id']}").json() == first.json()


def test_the_official_client_reads_it_all(tmp_path: Path) -> None:
    import httpx2
    import openai

    played = ScriptedApp(tmp_path, CALLS, HELLO)

    async def scenario() -> tuple[list[str], str]:
        transport = httpx2.ASGITransport(played.app)
        async with openai.AsyncOpenAI(
            api_key=played.keys["acme"],
            base_url="http://here/v1",
            http_client=httpx2.AsyncClient(transport=transport),
        ) as client:
            async with client.responses.stream(model="tiny", input="Hi", tools=[WEATHER]) as stream:  # type: ignore[list-item]
                async for _ in stream:
                    pass
                final = await stream.get_final_response()
            kinds = [item.type for item in final.output]
            answer = await client.responses.create(
                model="tiny",
                previous_response_id=final.id,
                input=[
                    {"type": "function_call_output", "call_id": name, "output": "sun"}
                    for name in ("call_1", "call_2")
                ],
            )
            items = await client.responses.input_items.list(answer.id, order="asc")
            assert [item.type async for item in items] == [
                "message",
                *kinds,
                "function_call_output",
                "function_call_output",
            ]
            assert (await client.responses.retrieve(answer.id)).output_text == answer.output_text
            await client.responses.delete(answer.id)
            return kinds, answer.output_text

    assert played.run(scenario()) == (["message", "function_call", "function_call"], "Hello")


def test_a_call_that_is_cut_short_is_the_item_that_is_incomplete(tmp_path: Path) -> None:
    cut = Delta(0, "", 1, "length", tool_calls=(ToolCall(0, "call_1", "weather", '{"ci'),))
    played = ScriptedApp(tmp_path, [[ACCEPTED], [Delta(0, "Hm", 1)], [cut, FINISHED]])
    events = checked_events(played.stream(PATH, ASK | {"tools": [WEATHER]}))
    assert [item["status"] for item in events[-1]["response"]["output"]] == ["completed", "incomplete"]
