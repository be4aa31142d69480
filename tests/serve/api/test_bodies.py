"""A body is bounded before it becomes objects: no list or dict of it grows with what a client sends."""

import asyncio
import contextlib
import gc
import gzip
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from serve.api import chat, completions, embeddings, messages, responses
from serve.api.admin.keys import NewKey
from serve.api.embeddings import EmbeddingRequest
from serve.errors import InvalidRequest
from serve.formats.body_budget import COST_MAX, DEPTH_MAX, check_body
from serve.formats.chat import ChatCompletionRequest
from serve.formats.completions import CompletionRequest
from serve.formats.messages.request import MessagesRequest
from serve.formats.responses.request import ResponsesRequest
from serve.formats.sampling import parse
from tests.support.scripted_app import HELLO, ScriptedApp

MIB = 1 << 20
# Read by their routes themselves, after authentication; FastAPI knows all others.
READ_BY_ROUTES: dict[Any, type[BaseModel]] = {
    chat: ChatCompletionRequest,
    completions: CompletionRequest,
    responses: ResponsesRequest,
    messages: MessagesRequest,
    embeddings: EmbeddingRequest,
}
COLLECTIONS = ["list", "set", "frozenset", "dict", "tuple"]


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> ScriptedApp:
    return ScriptedApp(tmp_path_factory.mktemp("bodies"), HELLO)


def collections(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each list and dict in a core schema, with its place."""
    if isinstance(schema, dict):
        if schema.get("type") in COLLECTIONS:
            yield path, schema
        for key, value in schema.items():
            if key not in ("metadata", "serialization", "cls", "config"):
                yield from collections(value, f"{path}.{key}" if key not in ("schema", "fields") else path)
    elif isinstance(schema, list | tuple):
        for entry in schema:
            yield from collections(entry, path)


def test_every_list_and_dict_of_every_body_is_bounded(app: ScriptedApp) -> None:
    bodies: dict[str, Any] = {model.__name__: model for model in READ_BY_ROUTES.values()}
    for module in READ_BY_ROUTES:
        assert any(isinstance(route, APIRoute) for route in module.router.routes)
    routes = [route for route in _routes(app.app.routes) if route.body_field is not None]
    assert len(routes) > 15
    for route in routes:
        assert route.body_field is not None
        bodies[route.path] = route.body_field.field_info.annotation
    unbounded = [
        f"{name}{path}"
        for name, model in bodies.items()
        for path, schema in collections(TypeAdapter(model).core_schema)
        if not schema.get("fail_fast") and schema.get("max_length") is None
    ]
    assert unbounded == []


def _routes(routes: Any) -> Iterator[APIRoute]:
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        elif (original := getattr(route, "original_router", None)) is not None:
            yield from _routes(original.routes)


CHAT = '{"model":"m","messages":[{"role":"user","content":"a"}],'
PLACES: dict[str, tuple[type[BaseModel], str, str]] = {
    "messages of chat": (ChatCompletionRequest, '{"model":"m","messages":[', "]}"),
    "parts of a message": (ChatCompletionRequest, CHAT[:-4] + '},{"role":"user","content":[', "]}]}"),
    "stop": (ChatCompletionRequest, CHAT + '"stop":[', "]}"),
    "tools": (ChatCompletionRequest, CHAT + '"tools":[', "]}"),
    "unknown": (ChatCompletionRequest, CHAT + '"x":[', "]}"),
    "prompts": (CompletionRequest, '{"model":"m","prompt":[', "]}"),
    "input": (ResponsesRequest, '{"model":"m","input":[', "]}"),
    "include": (ResponsesRequest, '{"model":"m","input":"a","include":[', "]}"),
    "turns": (MessagesRequest, '{"model":"m","max_tokens":1,"messages":[', "]}"),
    "system": (MessagesRequest, '{"model":"m","max_tokens":1,"system":[', '],"messages":[]}'),
    "embeddings": (EmbeddingRequest, '{"model":"m","input":[', "]}"),
}
ITEMS = [
    "1",
    '""',
    '"a"',
    "[]",
    "[1]",
    "{}",
    '{"a":1}',
    "null",
    "1e308",
    '{"role":"user","content":""}',
    '{"type":"text","text":""}',
]


def hostile_bodies(seed: int) -> Iterator[tuple[str, type[BaseModel], bytes]]:
    """Bodies of a mebibyte, and of just what the budget lets through."""
    rng = random.Random(seed)
    for place, (model, head, tail) in PLACES.items():
        for item in [*ITEMS, ",".join(rng.choices(ITEMS, k=5))]:
            cost = item.count(",") + 1 + 16 * (item.count("{") + item.count("["))
            most = (MIB - len(head) - len(tail)) // (len(item) + 1)
            for count in {most, min(most, (COST_MAX - 200) // cost), 2047}:
                yield f"{place}: {count} × {item}", model, (head + ",".join([item] * count) + tail).encode()
    for field in ("logit_bias", "metadata", "x", "response_format"):
        keys = ",".join(f'"{rng.getrandbits(24)}":1' for _ in range(70_000))
        yield f"{field}: many keys", ChatCompletionRequest, (CHAT + f'"{field}":{{{keys}}}}}').encode()
        same = ",".join(['"1":1'] * 130_000)
        yield f"{field}: one key again", ChatCompletionRequest, (CHAT + f'"{field}":{{{same}}}}}').encode()
    yield "a huge number", ChatCompletionRequest, (CHAT + '"n":' + "1" * MIB + "}").encode()
    yield "deep", ChatCompletionRequest, (CHAT + '"x":' + "[" * 500_000 + "]" * 500_000 + "}").encode()


def test_a_hostile_mebibyte_of_each_body_is_read_or_refused_in_bounded_time() -> None:
    """The bar is 100 ms of CPU; five times as much is allowed here, for slow machines."""
    figures = []
    gc.collect()
    gc.freeze()  # a collection of all that the tests have imported is not the body's
    for name, model, body in hostile_bodies(seed=16):
        started_s = time.process_time()
        with contextlib.suppress(InvalidRequest):
            parse(model, body)
        figures.append((time.process_time() - started_s, name))
    gc.unfreeze()
    figures.sort(reverse=True)
    sys.stdout.write("".join(f"{1e3 * cpu_s:.1f} ms: {name}\n" for cpu_s, name in figures[:5]))
    assert figures[0][0] < 0.5, figures[0]


def test_punctuation_in_a_text_costs_nothing() -> None:
    text = '[{,]}\\"' * (MIB // 8)
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()
    check_body(body)
    assert parse(ChatCompletionRequest, body).messages[0].content == text


@pytest.mark.parametrize("make", [lambda n: [[]] * n, lambda n: [{}] * n, lambda n: {"a": [1] * (17 * n)}])
def test_the_budget_counts_what_is_outside_of_texts(make: Callable[[int], Any]) -> None:
    check_body(json.dumps(make(COST_MAX // 17 - 16)).encode())
    with pytest.raises(InvalidRequest) as refused:
        check_body(json.dumps(make(COST_MAX // 17 + 16)).encode())
    assert refused.value.code == "body_too_complex"


def test_a_body_may_be_as_deep_as_the_bound_and_no_deeper() -> None:
    check_body(b"[" * DEPTH_MAX + b'"' + b"[" * 500 + b'"' + b"]" * DEPTH_MAX)
    with pytest.raises(InvalidRequest, match="levels deep"):
        check_body(b"[" * (DEPTH_MAX + 1) + b"]" * (DEPTH_MAX + 1))


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/batches"]
)
def test_a_kilobyte_that_inflates_to_a_mebibyte_does_not_hold_others_up(app: ScriptedApp, path: str) -> None:
    body = gzip.compress(b'{"model":"m","messages":[' + b"[]," * 349_000 + b"[]]}")
    assert len(body) < 2_000

    async def scenario() -> httpx.Response:
        lags = []

        async def measure() -> None:
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(0.001)
                lags.append(time.monotonic() - before_s)

        measuring = asyncio.create_task(measure())
        transport = httpx.ASGITransport(app.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"authorization": f"Bearer {app.keys['acme']}", "content-encoding": "gzip"}
            headers["content-type"] = "application/json"
            answer = await client.post(path, content=body, headers=headers)
        while not lags:  # the answer may have come within one of its naps
            await asyncio.sleep(0.001)
        measuring.cancel()
        sys.stdout.write(f"{path}: the loop was late by {1e3 * max(lags):.1f} ms at most\n")
        assert max(lags) < 1.0  # 23 s before there was a budget; the bar is 50 ms
        return answer

    answer = app.run(scenario())
    assert answer.status_code == 400
    assert "too many values" in answer.text


def test_an_unknown_field_is_one_error_and_many_are_one_too() -> None:
    with pytest.raises(ValueError, match="1 validation error"):
        NewKey.model_validate({f"k{number}": 1 for number in range(10_000)})
