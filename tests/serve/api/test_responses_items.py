"""Items that clients send to the Responses API by reference, and tools of other types than functions."""

from pathlib import Path
from typing import Any, get_args

from openai.types.responses import tool as openai_tools

from serve.engine.protocol import Delta, Message, ToolCall
from serve.formats.responses.tools import HOSTED, custom_arguments, custom_input
from tests.serve.api.test_responses import ASK, PATH, checked, checked_events
from tests.support.agent_turns import codex_turn
from tests.support.scripted_app import HELLO, Json, ScriptedApp, says

USER: Json = {"role": "user", "content": "And now?"}
PATCH = '*** Begin "Patch"\nä'
CALLS = says(
    Delta(0, "", 1, tool_calls=(ToolCall(0, "call_1", "apply_patch", ""),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments=custom_arguments(PATCH)[:9]),)),
    Delta(0, "", 1, tool_calls=(ToolCall(0, arguments=custom_arguments(PATCH)[9:]),)),
    Delta(0, "", 1, "tool_calls", tool_calls=(ToolCall(1, "call_2", "mcp__github__search_issues", "{}"),)),
)


def reference(item_id: str, **fields: str) -> Json:
    return {"type": "item_reference", "id": item_id} | fields


def test_a_reference_stands_for_the_stored_item_whichever_turn_it_is_of(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first = played.say(PATH, ASK)
    asked = played.ask("GET", f"{PATH}/{first['id']}/input_items").json()["data"][0]
    (answered,) = first["output"]
    by_id = [reference(asked["id"]), {"id": answered["id"]}, USER]
    for body in ({"input": by_id}, {"input": by_id, "store": False}):
        second = checked(played.say(PATH, ASK | body))
        assert played.engine.requests[-1].prompt == (
            Message("user", "Hello"),
            Message("assistant", "Hello"),
            Message("user", "And now?"),
        )
        assert second.output_text == "Hello"
    kept = played.say(PATH, ASK | {"input": by_id})
    items = played.ask("GET", f"{PATH}/{kept['id']}/input_items", None).json()["data"]
    assert {asked["id"], answered["id"]} < {item["id"] for item in items}
    played.say(PATH, ASK | {"input": "More", "previous_response_id": kept["id"]})
    assert len(played.engine.requests[-1].prompt) == 5


def test_a_call_and_reasoning_are_referred_to_as_ai_sdk_does(tmp_path: Path) -> None:
    called = says(
        Delta(0, "", 1, reasoning="Hm."),
        Delta(0, "", 1, "tool_calls", tool_calls=(ToolCall(0, "call_1", "shell", "{}"),)),
    )
    played = ScriptedApp(tmp_path, called)
    items = played.say(PATH, ASK)["output"]
    assert [item["type"] for item in items] == ["reasoning", "function_call"]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "ok"}
    played.say(PATH, ASK | {"input": [*(reference(item["id"]) for item in items), output]})
    assert played.engine.requests[-1].prompt == (
        Message("assistant", None, (ToolCall(0, "call_1", "shell", "{}"),)),
        Message("tool", "ok", tool_call_id="call_1"),
    )


def test_an_item_that_is_unknown_unstored_deleted_or_anothers_is_not_found(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    unstored = played.say(PATH, ASK | {"store": False})["output"][0]["id"]
    anothers = played.say(PATH, ASK, tenant="rival")["output"][0]["id"]
    deleted = played.say(PATH, ASK)
    played.ask("DELETE", f"{PATH}/{deleted['id']}")
    texts = set()
    bills = played.bills()
    for name in (unstored, anothers, deleted["output"][0]["id"], "msg_1", "x" * 128, "msg_\x00"):
        answer = played.ask("POST", PATH, ASK | {"input": [reference(name), USER]})
        assert answer.status_code == 404, answer.text
        error = answer.json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "input")
        texts.add(error["message"].replace(name, "…"))
    assert len(texts) == 1
    assert "`store`" in texts.pop()
    assert played.bills() == bills


def test_an_item_may_stand_in_a_conversation_once(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    first = played.say(PATH, ASK)
    mine = reference(first["output"][0]["id"])
    for body in ({"input": [mine, mine]}, {"input": [mine], "previous_response_id": first["id"]}):
        error = played.ask("POST", PATH, ASK | body).json()["error"]
        assert (error["param"], error["message"][:14]) == ("input", "Duplicate item")
    assert played.ask("POST", PATH, ASK | {"input": [reference("x")] * 300}).status_code == 400


def test_a_codex_turn_works_and_says_which_tools_the_model_was_not_offered(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS)
    answer = played.ask("POST", PATH, codex_turn("tiny", "Hello", stream=False))
    assert answer.headers["x-bespoke-ignored-tools"] == "web_search, local_shell"
    response = checked(answer.json())
    assert [tool["type"] for tool in answer.json()["tools"]] == ["function", "custom", "namespace"]
    toolbox = played.engine.requests[0].toolbox
    assert toolbox is not None
    assert [tool.name for tool in toolbox.tools] == ["shell", "apply_patch", "mcp__github__search_issues"]
    assert "*** Begin Patch" in (toolbox.tools[1].description or "")
    custom, function = (item.to_dict() for item in response.output)
    assert (custom["type"], custom["name"], custom["input"]) == ("custom_tool_call", "apply_patch", PATCH)
    assert (function["name"], function["namespace"]) == ("search_issues", "mcp__github__")
    streamed = checked_events(played.stream(PATH, codex_turn("tiny", "Hello")))
    assert strip(streamed[-1]["response"]["output"]) == strip(answer.json()["output"])
    done = [event for event in streamed if event["type"] == "response.custom_tool_call_input.done"]
    assert [event["input"] for event in done] == [PATCH]


def strip(items: list[Json]) -> list[Json]:
    return [{name: value for name, value in item.items() if name != "id"} for item in items]


def test_the_next_codex_turn_brings_its_calls_and_their_outputs_back(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS)
    turn = codex_turn("tiny", "Hello", stream=False)
    items = strip(played.say(PATH, turn)["output"])
    reasoning = {"type": "reasoning", "summary": [], "content": None, "encrypted_content": "gAAAA"}
    outputs = [
        {"type": "custom_tool_call_output", "call_id": "call_1", "output": "done"},
        {"type": "function_call_output", "call_id": "call_2", "output": "none"},
    ]
    played.say(PATH, turn | {"input": [*turn["input"], reasoning, *items, *outputs], "store": True})
    calls = (
        ToolCall(0, "call_1", "apply_patch", custom_arguments(PATCH)),
        ToolCall(1, "call_2", "mcp__github__search_issues", "{}"),
    )
    assert played.engine.requests[-1].prompt[3:] == (
        Message("assistant", None, calls),
        Message("tool", "done", tool_call_id="call_1"),
        Message("tool", "none", tool_call_id="call_2"),
    )


def test_a_custom_tool_can_be_forced_and_two_tools_of_one_name_are_refused(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, CALLS)
    choice = {"type": "custom", "name": "apply_patch"}
    played.say(PATH, codex_turn("tiny", "Hello", stream=False, tool_choice=choice))
    toolbox = played.engine.requests[0].toolbox
    assert toolbox is not None
    assert (toolbox.choice, toolbox.function) == ("required", "apply_patch")
    twice = [{"type": "custom", "name": "f"}, {"type": "function", "name": "f"}]
    assert played.ask("POST", PATH, ASK | {"tools": twice}).json()["error"]["param"] == "tools"


def test_only_hosted_tools_are_no_tools(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    answer = played.ask("POST", PATH, ASK | {"tools": [{"type": kind} for kind in HOSTED]})
    assert answer.json()["tools"] == []
    assert answer.headers["x-bespoke-ignored-tools"].split(", ") == list(HOSTED)
    assert played.engine.requests[0].toolbox is None


def test_a_custom_tools_input_that_was_cut_short_is_its_beginning() -> None:
    arguments = custom_arguments(PATCH)
    texts = [custom_input(arguments[:cut]) for cut in range(len(arguments) + 1)]
    assert all(PATCH.startswith(text) for text in texts)
    assert texts[-1] == PATCH


def test_arguments_that_are_no_object_are_the_input_itself() -> None:
    texts = ["[1]", "*** Begin", '{"input": 1}', '{"command": "ls"}']
    assert [custom_input(text) for text in texts] == texts


def test_every_type_of_tool_that_openais_client_knows_is_offered_or_left_out() -> None:
    union: Any = get_args(openai_tools.Tool)[0]
    literals = [kind for model in get_args(union) for kind in get_args(model.model_fields["type"].annotation)]
    assert set(literals) - {"function", "custom", "namespace"} <= set(HOSTED)
