"""Answers keep the form that a client asks for, and a form that costs too much costs its sender alone."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.support.constants import TENANTS, TINY
from tests.support.live_service import HELLO, LiveService

pytestmark = pytest.mark.slow

ATTACKER, VICTIM = TENANTS
# Each is within every bound of a schema, and compiles for minutes.
DEAR = {"type": "object", "properties": {f"k{n}": {"type": "string", "format": "uri"} for n in range(500)}}
SCHEMA_PARAM = "response_format.json_schema.schema"


def dear(number: int) -> dict[str, Any]:
    schema = DEAR | {"title": f"number {number}"}
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    return {"model": TINY, "messages": HELLO, "max_tokens": 2, "response_format": response_format}


def test_a_schema_that_compiles_for_minutes_is_refused_while_another_tenant_is_served(
    live: LiveService,
) -> None:
    live.wait_idle()
    events = live.count_events()
    with ThreadPoolExecutor(3) as pool:
        attacks = [pool.submit(live.post, dear(number), tenant=ATTACKER) for number in range(3)]
        victim = live.client(VICTIM).chat.completions
        served = 0
        while not all(attack.done() for attack in attacks):
            served += bool(victim.create(model=TINY, messages=HELLO, max_tokens=2).choices)
    assert served
    for attack in attacks:
        answer = attack.result()
        error = answer.json()["error"]
        # A machine without a free core says that it has had no time for it.
        if answer.status_code == 503:
            assert "retry-after" in answer.headers
        else:
            assert (answer.status_code, error["code"]) == (400, "schema_too_complex")
            assert error["param"] == SCHEMA_PARAM
    live.wait_idle()
    assert live.count_events() == events + served


@pytest.mark.compatibility("OpenAI (Python)", "vLLM's structured outputs")
def test_vllms_structured_outputs_hold_in_chat_and_completions(live: LiveService) -> None:
    client = live.client()
    asked: dict[str, Any] = {"model": TINY, "max_tokens": 48, "temperature": 1.0}
    for fields, holds in (
        ({"structured_outputs": {"choice": ["north", "south-west"]}}, r"north|south-west"),
        ({"structured_outputs": {"regex": "[0-9]{3}-[a-f]{2}"}}, r"[0-9]{3}-[a-f]{2}"),
        ({"guided_choice": ["ja", "nein"]}, "ja|nein"),
        ({"guided_json": {"type": "object", "properties": {}, "additionalProperties": False}}, r"\{\}"),
    ):
        chat = client.chat.completions.create(messages=HELLO, extra_body=fields, **asked)
        text = client.completions.create(prompt="Hello", extra_body=fields, **asked)
        for answer in (chat.choices[0].message.content, text.choices[0].text):
            assert re.fullmatch(holds, answer or ""), fields
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            prompt="Hello", extra_body={"structured_outputs": {"regex": "[0-9"}}, **asked
        )
    assert refused.value.param == "structured_outputs.regex"
    assert json.loads(refused.value.response.content)["error"]["code"] == "invalid_value"
