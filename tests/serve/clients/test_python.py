"""The official openai client for Python against the running gateway: what an application does with it."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from serve.api.schemas import ChatCompletion, ChatCompletionChunk, TextCompletion
from serve.billing.ledger.ledger import Ledger
from serve.rate_limits.limits import Limits, LimitStore
from tests.support.constants import NOON, TENANTS, TINY, TINY_TWO
from tests.support.live_service import LiveService, run_batch

pytestmark = pytest.mark.slow

LUMEN, TIDEWATER = TENANTS
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "A forecast.", "parameters": CITY},
}


class Forecast(BaseModel):
    sunny: bool
    wind: int


@pytest.mark.compatibility("OpenAI (Python)", "tools")
def test_a_tool_that_must_be_called_is_called_with_arguments_of_its_schema(live: LiveService) -> None:
    answer = live.client().chat.completions.create(
        model=TINY, messages=HELLO, tools=[WEATHER], tool_choice="required", max_tokens=120, temperature=0
    )
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "weather"
    arguments = json.loads(call.function.arguments)
    assert arguments["city"] in ("Paris", "Rome")
    assert 0 <= arguments["days"] <= 9
    answered = live.client().chat.completions.create(
        model=TINY,
        messages=[
            *HELLO,
            choice.message.model_dump(exclude_none=True),  # type: ignore[list-item]
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=[WEATHER],
        max_tokens=4,
        temperature=0,
    )
    assert answered.usage is not None
    assert answered.usage.prompt_tokens > 0


@pytest.mark.compatibility("OpenAI (Python)", "tools")
def test_a_streamed_tool_call_adds_up_to_the_whole_one(live: LiveService) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "tools": [WEATHER], "tool_choice": named}
    asked |= {"max_tokens": 120, "temperature": 0}
    whole = live.client().chat.completions.create(**asked)
    with live.client().chat.completions.stream(**asked) as stream:
        for _ in stream:
            pass
        streamed = stream.get_final_completion()
    (call,), (piece,) = (
        whole.choices[0].message.tool_calls or (),
        streamed.choices[0].message.tool_calls or (),
    )
    assert call.type == piece.type == "function"
    assert json.loads(piece.function.arguments) == json.loads(call.function.arguments)
    assert piece.function.name == call.function.name
    assert streamed.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"


def test_tools_that_may_not_be_called_are_not(live: LiveService) -> None:
    answer = live.client().chat.completions.create(
        model=TINY, messages=HELLO, tools=[WEATHER], tool_choice="none", max_tokens=4
    )
    assert not answer.choices[0].message.tool_calls


@pytest.mark.compatibility("OpenAI (Python)", "structured output")
def test_structured_output_parses_into_the_clients_own_type(live: LiveService) -> None:
    answer = live.client().chat.completions.parse(
        model=TINY, messages=HELLO, response_format=Forecast, max_tokens=200, seed=4, logit_bias={"33": -5}
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(answer.choices[0].message.parsed, Forecast)
    answer_object = live.client().chat.completions.create(
        model=TINY, messages=HELLO, response_format={"type": "json_object"}, max_tokens=100, temperature=0
    )
    if answer_object.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer_object.choices[0].message.content or ""), dict)


@pytest.mark.compatibility("OpenAI (Python)", "log-probabilities")
def test_logprobs_name_each_token_with_its_alternatives(live: LiveService) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "max_tokens": 3, "temperature": 0}
    answer = live.client().chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 3
    for one in told.content:
        assert one.logprob <= 0
        assert [other.logprob for other in one.top_logprobs] == sorted(
            (other.logprob for other in one.top_logprobs), reverse=True
        )
        assert one.top_logprobs[0].token == one.token  # greedy
    chunks = live.client().chat.completions.create(**asked, logprobs=True, stream=True)
    streamed = [
        one.token
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for one in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == [one.token for one in told.content]
    assert live.client().chat.completions.create(**asked).choices[0].logprobs is None


def test_logit_bias_forces_a_token(live: LiveService) -> None:
    forced = live.client().chat.completions.create(
        model=TINY, messages=HELLO, max_tokens=3, temperature=0, logit_bias={"100": 100}
    )
    text = forced.choices[0].message.content or ""
    assert len(text) == 3
    assert len(set(text)) == 1


def test_a_seed_makes_sampling_repeatable(live: LiveService) -> None:
    answers = {
        live.client()
        .chat.completions.create(model=TINY, messages=HELLO, max_tokens=6, seed=11)
        .choices[0]
        .message.content
        for _ in range(2)
    }
    assert len(answers) == 1


@pytest.mark.compatibility("OpenAI (Python)", "text completions")
def test_completions_take_several_prompts_and_echo_them_with_logprobs(live: LiveService) -> None:
    answer = live.client().completions.create(
        model=TINY, prompt=["Once upon a time", "Two"], max_tokens=2, n=2, echo=True, logprobs=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for choice, prompt in zip(answer.choices, ["Once upon a time"] * 2 + ["Two"] * 2, strict=True):
        assert choice.text.startswith(prompt)
        assert choice.logprobs is not None
        assert choice.logprobs.tokens is not None
        assert "".join(choice.logprobs.tokens).startswith(prompt)
        assert (choice.logprobs.token_logprobs or [])[0] is None
        assert choice.logprobs.text_offset == [
            len("".join(choice.logprobs.tokens[:number])) for number in range(len(choice.logprobs.tokens))
        ]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    event = live.last_event()
    assert (event["samples"], event["prompt_tokens"]) == (2, answer.usage.prompt_tokens)


def test_completions_take_token_ids(live: LiveService) -> None:
    answer = live.client().completions.create(model=TINY, prompt=[100, 101, 102], max_tokens=2)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        live.client().completions.create(model=TINY, prompt=[10**8], max_tokens=2)


def test_the_answers_are_what_the_openapi_document_says(live: LiveService) -> None:
    tools = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 120, "logprobs": True}
    for extra in ({"max_tokens": 3}, tools):
        asked = {"model": TINY, "messages": HELLO, "temperature": 0} | extra
        ChatCompletion.model_validate(live.post(asked).json(), strict=True)
        stream = live.post(asked | {"stream": True, "stream_options": {"include_usage": True}}).text
        for line in stream.splitlines():
            if line.startswith("data: {"):
                ChatCompletionChunk.model_validate_json(line.removeprefix("data: "), strict=True)
    TextCompletion.model_validate(
        httpx.post(
            f"{live.url}/v1/completions",
            json={"model": TINY, "prompt": "Once", "max_tokens": 2, "logprobs": 2},
            headers={"Authorization": f"Bearer {live.keys[LUMEN]}"},
            timeout=60,
        ).json(),
        strict=True,
    )


@pytest.mark.compatibility("OpenAI (Python)", "models")
def test_two_bases_are_served_behind_one_url_and_the_model_name_decides(live: LiveService) -> None:
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 1, "temperature": 0, "logprobs": True}
    told = {}
    for base in (TINY, TINY_TWO):
        answer = live.client().chat.completions.create(model=base, **asked)
        told[base] = answer.choices[0].logprobs
        assert answer.model == base
        assert live.last_event()["base"] == base
    assert told[TINY] != told[TINY_TWO]
    assert {TINY, TINY_TWO} <= {model.id for model in live.client().models.list()}


@pytest.mark.compatibility("OpenAI (Python)", "the client's own errors")
@pytest.mark.parametrize(
    ("asked", "raised", "code"),
    [
        ({"model": "nobody/nothing"}, openai.NotFoundError, "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "rain " * 2000}]},
            openai.BadRequestError,
            "context_length_exceeded",
        ),
        ({"temperature": 3}, openai.BadRequestError, "invalid_value"),
        ({"extra_body": {"cache_salt": "x"}}, openai.BadRequestError, "unsupported_parameter"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            openai.BadRequestError,
            "invalid_value",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "wat"}},
                }
            },
            openai.BadRequestError,
            "invalid_value",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}],
                    }
                ]
            },
            openai.BadRequestError,
            "invalid_value",
        ),
    ],
)
def test_errors_raise_the_clients_own_exceptions(
    live: LiveService, asked: dict[str, Any], raised: type[openai.APIStatusError], code: str | None
) -> None:
    events = live.count_events()
    with pytest.raises(raised) as error:
        live.client().chat.completions.create(**({"model": TINY, "messages": HELLO} | asked))  # type: ignore[call-overload]
    assert error.value.type == "invalid_request_error"
    assert code is None or error.value.code == code
    assert error.value.request_id
    live.wait_idle()
    assert live.count_events() == events


@pytest.mark.compatibility(
    "OpenAI (Python)", "embeddings of a base that generates text", result="refused by name"
)
def test_a_base_that_generates_text_makes_no_embeddings(live: LiveService) -> None:
    with pytest.raises(openai.BadRequestError, match="embeddings"):
        live.client().embeddings.create(model=TINY, input="Hello")
    with pytest.raises(openai.NotFoundError):
        live.client().embeddings.create(model="nobody/nothing", input="Hello")


def limited(live: LiveService, **limits: int) -> tuple[str, str]:
    key, secret = live.tenants.create_key(LUMEN, at=NOON)
    with live.store.write() as connection:
        LimitStore(live.store).set(connection, "key", key.id, Limits(**limits), at=NOON)
    return key.id, secret


def client_of(live: LiveService, secret: str, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, timeout=60, **options)


def test_a_limit_is_told_in_headers_and_then_429(live: LiveService) -> None:
    _, secret = limited(live, requests_per_min=2, tokens_per_min=10_000)
    client = client_of(live, secret, max_retries=0)
    asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "max_tokens": 2}
    raw = client.chat.completions.with_raw_response.create(**asked)
    assert raw.headers["x-ratelimit-limit-requests"] == "2"
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    assert raw.headers["x-ratelimit-limit-tokens"] == "10000"
    assert int(raw.headers["x-ratelimit-remaining-tokens"]) < 10_000
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    client.chat.completions.create(**asked)
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(**asked)
    assert (refused.value.code, refused.value.type) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 62


@pytest.mark.compatibility("OpenAI (Python)", "retries of a 429")
def test_the_client_retries_a_429_until_there_is_room(live: LiveService) -> None:
    _, secret = limited(live, concurrent_requests=1)
    patient = client_of(live, secret, max_retries=8)
    stream = patient.chat.completions.create(model=TINY, messages=HELLO, max_tokens=600, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        client_of(live, secret, max_retries=0).chat.completions.create(
            model=TINY, messages=HELLO, max_tokens=2
        )
    closing = threading.Timer(1.5, stream.close)
    closing.start()
    assert patient.chat.completions.create(model=TINY, messages=HELLO, max_tokens=2).choices
    closing.join()


def test_the_client_retries_a_503_until_the_store_is_back(live: LiveService) -> None:
    statuses: list[int] = []

    def free_it_after_the_first(answer: httpx.Response) -> None:
        statuses.append(answer.status_code)
        if len(statuses) == 1:
            database.execute("ROLLBACK")

    seen = httpx.Client(event_hooks={"response": [free_it_after_the_first]}, timeout=60)
    client = client_of(live, live.keys[LUMEN], max_retries=5, http_client=seen)
    with closing(sqlite3.connect(live.settings.home / "ledger.db", isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        assert client.chat.completions.create(model=TINY, messages=HELLO, max_tokens=2).choices
    assert statuses[0] == 503
    assert statuses[-1] == 200


@pytest.mark.compatibility("OpenAI (Python)", "Idempotency-Key")
def test_a_request_sent_again_with_its_idempotency_key_is_answered_and_billed_once(live: LiveService) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "max_tokens": 8}
    headers = {"Idempotency-Key": f"key-{time.monotonic_ns()}"}
    events = live.count_events()
    create = live.client().chat.completions.with_raw_response.create
    first, second = (create(**asked, extra_headers=headers) for _ in range(2))
    assert second.content == first.content
    assert second.headers["idempotency-replayed"] == "true"
    assert live.count_events() == events + 1
    with pytest.raises(openai.BadRequestError) as reused:
        create(**(asked | {"max_tokens": 9}), extra_headers=headers)
    assert reused.value.code == "idempotency_key_reused"
    other = live.client(TIDEWATER).chat.completions.with_raw_response.create(**asked, extra_headers=headers)
    assert "idempotency-replayed" not in other.headers


def test_a_client_that_gave_up_finds_the_answer_under_its_idempotency_key(live: LiveService) -> None:
    asked: dict[str, Any] = {"model": TINY, "messages": HELLO, "max_tokens": 300}
    headers = {"Idempotency-Key": f"key-{time.monotonic_ns()}"}
    events = live.count_events()
    hasty = openai.OpenAI(base_url=f"{live.url}/v1", api_key=live.keys[LUMEN], max_retries=0, timeout=0.4)
    with pytest.raises(openai.APITimeoutError):
        hasty.chat.completions.create(**asked, extra_headers=headers)
    with pytest.raises(openai.ConflictError):
        live.client().chat.completions.create(**asked, extra_headers=headers)
    live.wait_idle()
    found = live.client().chat.completions.create(**asked, extra_headers=headers)
    assert found.usage is not None
    assert live.count_events() == events + 1
    assert live.last_event()["completion_tokens"] == found.usage.completion_tokens


@pytest.mark.compatibility("OpenAI (Python)", "batches")
def test_a_batch_is_run_from_file_to_file_at_the_batch_price(live: LiveService) -> None:
    client = live.client()
    bodies = [
        {"model": TINY, "messages": HELLO, "max_tokens": 3},
        {"model": f"{LUMEN}/support", "messages": HELLO, "max_tokens": 3},
        {"model": "nobody/nothing", "messages": HELLO},
    ]
    done = run_batch(client, "/v1/chat/completions", bodies)
    assert done.request_counts is not None
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    assert done.output_file_id is not None
    answers = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    assert {answer["custom_id"] for answer in answers} == {"line-0", "line-1"}
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    assert done.error_file_id is not None
    assert "line-2" in client.files.content(done.error_file_id).text
    for other in (live.client(TIDEWATER),):
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(done.id)
        with pytest.raises(openai.NotFoundError):
            other.files.content(done.output_file_id)


@pytest.mark.compatibility("OpenAI (Python)", "Responses")
def test_responses_are_made_streamed_stored_and_continued(live: LiveService) -> None:
    client = live.client()
    made = client.responses.create(model=TINY, input="Hello", max_output_tokens=16, temperature=0)
    assert made.output_text
    assert client.responses.retrieve(made.id).output_text == made.output_text
    events = list(
        client.responses.create(model=TINY, input="Hello", max_output_tokens=16, temperature=0, stream=True)
    )
    last = events[-1]
    assert events[0].type == "response.created"
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == made.output_text
    more = client.responses.create(
        model=TINY, input="And now?", previous_response_id=made.id, max_output_tokens=16
    )
    assert more.usage is not None
    assert made.usage is not None
    assert more.usage.input_tokens > made.usage.input_tokens
    with pytest.raises(openai.NotFoundError):
        live.client(TIDEWATER).responses.retrieve(made.id)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


@pytest.mark.parametrize("left", ["chat", "stream"])
def test_nothing_is_held_after_any_of_this(live: LiveService, left: str) -> None:
    live.wait_idle()
    assert not Ledger(live.store).open_holds()


RESOURCES: list[tuple[str, Callable[[openai.OpenAI, str], Any]]] = [
    ("model", lambda client, name: client.models.retrieve(name)),
    ("file", lambda client, name: client.files.retrieve(name)),
    ("file content", lambda client, name: client.files.content(name)),
    ("file deletion", lambda client, name: client.files.delete(name)),
    ("batch", lambda client, name: client.batches.retrieve(name)),
    ("batch cancellation", lambda client, name: client.batches.cancel(name)),
    ("response", lambda client, name: client.responses.retrieve(name)),
    ("response deletion", lambda client, name: client.responses.delete(name)),
    ("response input", lambda client, name: client.responses.input_items.list(name).data),
]


@pytest.mark.parametrize(("kind", "touch"), RESOURCES, ids=[kind for kind, _ in RESOURCES])
def test_anothers_resource_and_one_that_is_not_there_look_the_same(
    live: LiveService, kind: str, touch: Callable[[openai.OpenAI, str], Any]
) -> None:
    mine = live.client(TIDEWATER)
    if kind == "model":
        name, unknown = f"{TIDEWATER}/support", f"{TIDEWATER}/suppurt"
    elif kind.startswith("file"):
        name = mine.files.create(file=("x.jsonl", b"{}"), purpose="batch").id
        unknown = name[:-1] + ("0" if name[-1] != "0" else "1")
    elif kind.startswith("batch"):
        file = mine.files.create(file=("x.jsonl", b"{}"), purpose="batch")
        name = mine.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id
        unknown = name[:-1] + ("0" if name[-1] != "0" else "1")
    else:
        name = mine.responses.create(model=TINY, input="Hello", max_output_tokens=16).id
        unknown = name[:-1] + ("0" if name[-1] != "0" else "1")
    seen = []
    for one in (name, unknown):
        with pytest.raises(openai.NotFoundError) as refused:
            touch(live.client(LUMEN), one)
        headers = {key for key in refused.value.response.headers if key not in ("date",)}
        seen.append((refused.value.response.text.replace(one, "X"), headers))
    assert seen[0] == seen[1]
