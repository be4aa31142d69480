"""A chat's stream begins as OpenAI's does."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_app import HELLO, ScriptedApp

TOOLS = [{"type": "function", "function": {"name": "weather"}}]


@pytest.mark.parametrize(
    ("fields", "content"),
    [({}, ""), ({"tools": TOOLS}, None), ({"tools": TOOLS, "tool_choice": "none"}, ""), ({"tools": []}, "")],
)
def test_a_stream_that_may_call_a_tool_opens_without_content(
    tmp_path: Path, fields: dict[str, Any], content: str | None
) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": turns, "max_tokens": 5, "stream": True} | fields
    answer = ScriptedApp(tmp_path, HELLO).ask("POST", "/v1/chat/completions", body)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    deltas = [json.loads(line)["choices"][0]["delta"] for line in lines[:-1]]
    assert deltas == [{"role": "assistant", "content": content}, {"content": "Hel"}, {"content": "lo"}]
