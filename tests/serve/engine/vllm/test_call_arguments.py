"""An earlier call is rendered whatever its arguments are, and loses nothing."""

import itertools
import json
from typing import Any

import pytest

from serve.engine.protocol import GenerationRequest, Message, Sampling, ToolCall
from serve.engine.vllm.prompts import arguments_of
from tests.support.engine_host import EngineHost

pytestmark = pytest.mark.slow

DEEP = '{"a":' * 5000
LONG_NUMBER = '{"n": ' + "9" * 5000 + "}"
_numbers = itertools.count()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        (" ", {}),
        ('{"city": "Oslo"}', {"city": "Oslo"}),
        ('{"city": "Os', {"city": "Os"}),
        ('{"days": [1, 2', {"days": [1, 2]}),
        ("no JSON", {"INVALID_JSON": "no JSON"}),
        ("[1]", {"INVALID_JSON": "[1]"}),
        (DEEP, {"INVALID_JSON": DEEP}),
        (LONG_NUMBER, {"INVALID_JSON": LONG_NUMBER}),
    ],
)
def test_arguments_are_an_object_for_the_template(
    host: EngineHost, arguments: str, expected: dict[str, Any]
) -> None:
    call = ToolCall(0, "c1", "weather", arguments)
    assert arguments_of(call) == expected
    turns = (
        Message("user", "Weather?"),
        Message("assistant", None, (call,)),
        Message("tool", "sunny", tool_call_id="c1"),
    )
    request = GenerationRequest(f"history-{next(_numbers)}", None, turns, Sampling(1), "salt")
    if len(arguments) > 1000:  # longer than the tiny model's context: only that the template takes it
        return
    rendered = host.run(host.engine._renderer.render(request))
    text = host.engine._renderer.tokenizer.decode(rendered.inputs[0]["prompt_token_ids"])
    assert json.dumps(expected) in text
