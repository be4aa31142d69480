"""A schema that the engine refuses is the client's error in each dialect, and costs nothing."""

from pathlib import Path
from typing import Any

import pytest

from serve.errors import InvalidRequest, RateLimited
from tests.support.constants import TINY
from tests.support.scripted_app import HELLO, Json, ScriptedApp
from tests.support.scripted_gateway import closings, events

SCHEMA = {"type": "object", "properties": {"k": {"type": "string", "format": "uri"}}}
TURN = [{"role": "user", "content": "Hello"}]
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
# fmt: off
DIALECTS: dict[str, tuple[str, Json]] = {
    "chat": ("/v1/chat/completions", {"messages": TURN, "response_format": JSON_SCHEMA}),
    "responses": ("/v1/responses", {
        "input": "Hello", "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
    }),
    "messages": ("/v1/messages", {
        "messages": TURN, "max_tokens": 5, "tools": [{"name": "f", "input_schema": SCHEMA}],
    }),
}
# fmt: on
TOO_COMPLEX = InvalidRequest("'the.field' is too complex: see there.", "the.field", "schema_too_complex")
TOO_MANY = RateLimited("new schemas being compiled", 8, 8, 1, 3)


def ask(app: ScriptedApp, dialect: str, *, stream: bool) -> Any:
    path, fields = DIALECTS[dialect]
    return app.ask("POST", path, {"model": TINY, "stream": stream} | fields)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_schema_that_is_too_complex_is_400_and_free(tmp_path: Path, dialect: str, stream: bool) -> None:
    app = ScriptedApp(tmp_path, [TOO_COMPLEX], HELLO)
    answer = ask(app, dialect, stream=stream)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "'the.field' is too complex" in error["message"]
    if dialect != "messages":  # Anthropic's errors have neither
        assert (error["code"], error["param"]) == ("schema_too_complex", "the.field")
    assert len(app.engine.requests) == 1  # no other replica is tried
    assert (events(app.store), closings(app.store)) == ([], ["void"])


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_tenant_with_too_many_new_schemas_is_told_when_to_come_back(tmp_path: Path, dialect: str) -> None:
    app = ScriptedApp(tmp_path, [TOO_MANY], HELLO)
    answer = ask(app, dialect, stream=False)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "3"
    assert "new schemas being compiled" in answer.json()["error"]["message"]
    assert len(app.engine.requests) == 1
    assert (events(app.store), closings(app.store)) == ([], ["void"])
