"""Agents' turns against the running gateway, as Codex and Claude Code send them, by the official clients."""

from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.support.agent_turns import APPLY_PATCH, claude_code_turn, codex_turn
from tests.support.constants import TENANTS, TINY
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow

CODEX, CLAUDE_CODE = "Codex-like turns", "Claude-Code-like turns"


def codex(live: LiveService, **fields: Any) -> tuple[Any, httpx.Headers]:
    """The last response of one streamed turn, and the headers."""
    turn = codex_turn(TINY, "Hello", max_output_tokens=60, temperature=0) | fields
    create: Any = live.client().responses.with_raw_response.create
    raw = create(model=turn.pop("model"), input=turn.pop("input"), stream=turn.pop("stream"), extra_body=turn)
    *_, last = raw.parse()
    assert last.type in ("response.completed", "response.incomplete")
    return last.response, raw.headers


@pytest.mark.compatibility(CODEX, "Responses")
@pytest.mark.compatibility(CODEX, "a second turn")
@pytest.mark.compatibility(CODEX, "hosted tools are left out and told")
def test_a_codex_session_goes_on(live: LiveService) -> None:
    first, headers = codex(live)
    assert headers["x-bespoke-ignored-tools"] == "web_search, local_shell"
    assert first.store is False
    turn = codex_turn(TINY, "Hello")
    said = [item.to_dict() for item in first.output]
    reasoning = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
    calls = [item["call_id"] for item in said if "call_id" in item]
    outputs = [{"type": "function_call_output", "call_id": call_id, "output": "ok"} for call_id in calls]
    second, _ = codex(live, input=[*turn["input"], reasoning, *said, *outputs, turn["input"][1]])
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.compatibility(CODEX, "tools")
@pytest.mark.compatibility(CODEX, "custom tools")
def test_a_custom_tool_of_codex_is_called_with_text(live: LiveService) -> None:
    choice = {"type": "custom", "name": "apply_patch"}
    answer, _ = codex(live, tools=[APPLY_PATCH], tool_choice=choice, max_output_tokens=200)
    (call,) = (item for item in answer.output if item.type == "custom_tool_call")
    assert call.name == "apply_patch"
    assert isinstance(call.input, str)


@pytest.mark.compatibility(
    "OpenAI (Python)", "hosted tools are refused where they are forced", result="refused by name"
)
def test_a_hosted_tool_that_must_be_called_is_refused_by_name(live: LiveService) -> None:
    with pytest.raises(openai.BadRequestError, match="web_search"):
        codex(live, tool_choice={"type": "web_search"})


@pytest.mark.compatibility("OpenAI (Python)", "token counts")
def test_openais_client_counts_a_codex_turn(live: LiveService) -> None:
    turn = codex_turn(TINY, "Hello")
    asked: Any = {name: turn[name] for name in ("model", "input", "instructions", "tools")}
    events = live.count_events()
    counted = live.client().responses.input_tokens.count(**asked)
    answer = live.client().responses.create(**asked, max_output_tokens=16)
    assert answer.usage is not None
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", answer.usage.input_tokens)
    assert live.count_events() == events + 1


@pytest.mark.compatibility("OpenAI (Python)", "a second turn by item_reference")
def test_openais_client_names_a_stored_item(live: LiveService) -> None:
    client = live.client()
    made = client.responses.create(model=TINY, input="Hello", max_output_tokens=16)
    reference: Any = {"type": "item_reference", "id": made.output[0].id}
    more = client.responses.create(
        model=TINY, input=[reference, {"role": "user", "content": "And now?"}], max_output_tokens=16
    )
    assert made.usage is not None
    assert more.usage is not None
    assert more.usage.input_tokens > made.usage.output_tokens
    with pytest.raises(openai.NotFoundError, match="store"):
        live.client(TENANTS[1]).responses.create(model=TINY, input=[reference], max_output_tokens=16)


@pytest.mark.compatibility("OpenAI (Python)", "its own default length")
def test_a_length_above_the_context_is_as_much_as_there_is(live: LiveService) -> None:
    hello: Any = [{"role": "user", "content": "Hello"}]
    create = live.client().chat.completions.with_raw_response.create
    raw = create(model=TINY, messages=hello, max_completion_tokens=100_000, stop=["e", " "])
    usage = raw.parse().usage
    assert usage is not None
    assert (
        int(raw.headers["x-bespoke-max-tokens"]) == live.settings.engine.max_model_len - usage.prompt_tokens
    )


@pytest.mark.compatibility(CLAUDE_CODE, "Messages")
@pytest.mark.compatibility(CLAUDE_CODE, "a second turn")
@pytest.mark.compatibility(CLAUDE_CODE, "token counts")
@pytest.mark.compatibility(CLAUDE_CODE, "its own default length")
@pytest.mark.compatibility("Anthropic (Python)", "token counts")
def test_a_claude_code_session_counts_and_goes_on(live: LiveService) -> None:
    client = anthropic.Anthropic(base_url=live.url, api_key=live.keys[TENANTS[0]], max_retries=0)
    messages = claude_code_turn(TINY, "Hello")["messages"]
    for _ in range(2):
        turn: Any = claude_code_turn(TINY, "Hello", messages=messages, stop_sequences=["e"])
        counted = client.messages.count_tokens(
            **{name: turn[name] for name in ("model", "messages", "system", "tools")}
        )
        body = {name: turn.pop(name) for name in ("temperature",)}
        turn.pop("stream")
        with client.messages.stream(**turn, extra_body=body) as stream:
            answer = stream.get_final_message()
        usage = answer.usage
        assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
        said = [block.to_dict() for block in answer.content] or "Yes."
        messages = [*messages, {"role": "assistant", "content": said}, *messages]


@pytest.mark.compatibility("a web page (fetch)", "preflight, answers and errors")
def test_a_page_on_this_machine_can_call(live: LiveService) -> None:
    page = {"origin": "http://localhost:5173"}
    asked = page | {"access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    assert httpx.options(f"{live.url}/v1/messages", headers=asked).status_code == 200
    refused = httpx.post(f"{live.url}/v1/messages", headers=page, json={}, timeout=60)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == page["origin"]
    streamed = live.post(
        {"model": TINY, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "stream": True},
        **page,
    )
    assert streamed.headers["access-control-allow-origin"] == page["origin"]
