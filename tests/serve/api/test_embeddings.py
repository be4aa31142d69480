"""/v1/embeddings over HTTP with a scripted engine: who may ask what, and what is billed."""

import asyncio
import struct
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.engine.protocol import Accepted, Delta, Finished, Pooling
from serve.errors import ContextLengthExceeded, EngineLost
from tests.support.constants import TINY
from tests.support.scripted_app import HELLO, Script, ScriptedApp

PATH = "/v1/embeddings"
ACCEPTED = Accepted("r", "b", 12)
VECTORS = [Delta(part, "", 0, "stop", embedding=struct.pack("<2f", 0.6, 0.8)) for part in range(2)]
TWO: Script = [[ACCEPTED], [*VECTORS, Finished(12, 0, 0, aborted=False)]]
ASKED = {"model": TINY, "input": ["a", "b"]}


def app_of(home: Path, *scripts: Script, size: int | None = 384) -> ScriptedApp:
    app = ScriptedApp(home, *scripts)
    app.engine.embedding_size = size
    return app


def test_embeddings_are_billed_by_their_prompt_tokens(tmp_path: Path) -> None:
    app = app_of(tmp_path, TWO)
    body = app.say(PATH, ASKED)
    assert [one["index"] for one in body["data"]] == [0, 1]
    assert body["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    assert app.bills() == [("acme", "complete", 12, 0, 0)]


def test_openais_client_gets_numbers(tmp_path: Path) -> None:
    """It asks for base64 by itself, and decodes it."""
    app = app_of(tmp_path, TWO)

    async def ask() -> openai.types.CreateEmbeddingResponse:
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app.app))
        async with openai.AsyncOpenAI(
            base_url="http://here/v1", api_key=app.keys["acme"], http_client=http
        ) as client:
            return await client.embeddings.create(model=TINY, input=["a", "b"], dimensions=2, user="u")

    answer = app.run(ask())
    assert [one.embedding for one in answer.data] == [pytest.approx([0.6, 0.8])] * 2
    assert app.engine.requests[0].pooling == Pooling(dimensions=2)


def test_a_retry_with_the_same_key_gets_the_same_vectors_and_is_billed_once(tmp_path: Path) -> None:
    app = app_of(tmp_path, TWO)
    first, second = (app.ask("POST", PATH, ASKED, **{"idempotency-key": "k"}) for _ in range(2))
    assert (first.status_code, second.json()) == (200, first.json())
    assert len(app.bills()) == 1


def test_a_request_whose_replica_died_is_embedded_by_another(tmp_path: Path) -> None:
    app = app_of(tmp_path, [[ACCEPTED], EngineLost()], TWO)
    assert len(app.say(PATH, ASKED)["data"]) == 2
    assert app.bills() == [("acme", "complete", 12, 0, 0)]


def test_what_was_computed_for_a_client_that_left_is_billed(tmp_path: Path) -> None:
    app = app_of(tmp_path, [[ACCEPTED], "hang", [VECTORS[0], Finished(6, 0, 0, aborted=True)]])
    app.leave(PATH, ASKED)
    assert app.bills() == [("acme", "disconnected", 6, 0, 0)]


def test_nothing_is_billed_for_a_client_that_left_before_the_first_vector(tmp_path: Path) -> None:
    app = app_of(tmp_path, [[ACCEPTED], "hang", [Finished(0, 0, 0, aborted=True)]])
    app.leave(PATH, ASKED)
    assert app.bills() == []


def test_an_input_that_is_too_long_is_refused_and_free(tmp_path: Path) -> None:
    app = app_of(tmp_path, [ContextLengthExceeded(256, 300, 0, "input.1")])
    error = app.ask("POST", PATH, ASKED)
    assert (error.status_code, error.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert error.json()["error"]["param"] == "input.1"
    assert app.bills() == []


TEXT = {"model": TINY, "messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", TEXT),
        ("/v1/completions", {"model": TINY, "prompt": "a"}),
        ("/v1/responses", {"model": TINY, "input": "a"}),
        ("/v1/messages", TEXT | {"max_tokens": 5}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_base_of_embeddings_generates_no_text(
    tmp_path: Path, path: str, body: dict[str, Any], stream: bool
) -> None:
    app = app_of(tmp_path, HELLO)
    answer = app.ask("POST", path, body | {"stream": stream})
    assert answer.status_code == 400
    assert "makes embeddings" in answer.json()["error"]["message"]
    assert (app.engine.requests, app.bills()) == ([], [])


@pytest.mark.parametrize(
    ("fields", "size", "param", "code"),
    [
        ({}, None, "model", "unsupported_model"),
        ({"dimensions": 385}, 384, "dimensions", "invalid_value"),
    ],
)
def test_what_the_base_cannot_do_is_refused_before_anything_is_held(
    tmp_path: Path, fields: dict[str, Any], size: int | None, param: str, code: str
) -> None:
    app = app_of(tmp_path, TWO, size=size)
    error = app.ask("POST", PATH, ASKED | fields)
    assert error.status_code == 400
    assert (error.json()["error"]["param"], error.json()["error"]["code"]) == (param, code)
    assert (app.engine.requests, app.bills()) == ([], [])


def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    assert app_of(tmp_path, TWO).ask("POST", PATH, ASKED | {"model": "no"}).status_code == 404


def test_a_base_of_embeddings_is_listed(tmp_path: Path) -> None:
    listed = app_of(tmp_path, TWO).ask("GET", "/v1/models").json()["data"]
    assert TINY in {model["id"] for model in listed}


def test_thousands_of_vectors_are_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_of(tmp_path, TWO)
    moved: list[object] = []
    to_thread = asyncio.to_thread

    async def noting(function: Any, *arguments: Any) -> Any:
        moved.append(function)
        return await to_thread(function, *arguments)

    monkeypatch.setattr("serve.api.streaming.asyncio.to_thread", noting)
    app.say(PATH, ASKED | {"encoding_format": "float"})
    assert any("bytes_of" in getattr(one, "__qualname__", "") for one in moved)
