"""Clients that nobody here made or configured: base URL, key, model name, and nothing else."""

from typing import Any

import anthropic
import pytest
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from tests.support.constants import TENANTS, TINY
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow


class Weather(BaseModel):
    """A forecast."""

    sunny: bool


@pytest.mark.compatibility("LangChain (openai)", "chat")
@pytest.mark.compatibility("LangChain (openai)", "tools")
@pytest.mark.compatibility("LangChain (openai)", "structured output")
def test_langchain_asks_streams_and_calls_tools(live: LiveService) -> None:
    model = ChatOpenAI(
        base_url=f"{live.url}/v1",
        api_key=live.keys[TENANTS[0]],
        model=f"{TENANTS[0]}/support",
        temperature=0,
        max_tokens=200,
    )  # type: ignore[arg-type]
    asked = [HumanMessage("What is your name?")]
    answer = model.invoke(asked)
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in model.stream(asked)) == answer.content
    called: Any = model.bind_tools([Weather], tool_choice="Weather").invoke(asked)
    assert called.tool_calls[0]["name"] == "Weather"
    assert isinstance(called.tool_calls[0]["args"]["sunny"], bool)
    assert isinstance(model.with_structured_output(Weather).invoke(asked), Weather)


@pytest.mark.compatibility("Anthropic (Python)", "Messages")
@pytest.mark.compatibility("Anthropic (Python)", "tools")
@pytest.mark.compatibility("Anthropic (Python)", "the client's own errors")
def test_anthropics_client_asks_streams_and_calls_tools(live: LiveService) -> None:
    client = anthropic.Anthropic(base_url=live.url, api_key=live.keys[TENANTS[0]], max_retries=0)
    asked: dict[str, Any] = {
        "model": TINY,
        "max_tokens": 8,
        "messages": [{"role": "user", "content": "Hello"}],
        "extra_body": {"temperature": 0},
    }
    answer = client.messages.create(**asked)
    assert answer.usage.output_tokens > 0
    with client.messages.stream(**asked) as stream:
        text = stream.get_final_text()
    assert answer.content[0].type == "text"
    assert text == answer.content[0].text
    schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
    tools: Any = [{"name": "weather", "input_schema": schema}]
    called = client.messages.create(**(asked | {"max_tokens": 120}), tools=tools, tool_choice={"type": "any"})
    (use,) = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use"
    assert isinstance(use.input, dict)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**(asked | {"model": "nobody/nothing"}))
    with pytest.raises(anthropic.AuthenticationError):
        anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0).messages.create(**asked)
