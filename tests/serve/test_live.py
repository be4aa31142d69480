"""The running gateway as clients see it: real Ray Serve, real vLLM, the official client."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from serve.billing.ledger.ledger import Ledger
from serve.registry.registry import AdapterRegistry, newest_published
from serve.registry.versions import VersionState
from serve.tenants import Tenants, server_secret
from tests.support.constants import MINILM, NOON, TENANTS, TINY, TINY_TWO
from tests.support.live_service import HELLO, LiveService, register_and_promote
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

BASES = (TINY, TINY_TWO, MINILM)
LUMEN, TIDEWATER = TENANTS


def body(**fields: Any) -> dict[str, Any]:
    return {"model": TINY, "messages": HELLO, "max_tokens": 4, "temperature": 0} | fields


def answer_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def tool(parameters: object) -> dict[str, Any]:
    function = {"name": "forecast", "parameters": parameters, "strict": True}
    return {"type": "function", "function": function}


# A grammar library that vLLM may choose knows both keywords; the one that tools need leaves out the length.
PATTERN_AND_LENGTH = {
    "type": "object",
    "properties": {"k": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3}},
    "required": ["k"],
}


def ask(
    live: LiveService, tenant: str, model: str, text: str = "What is your name?", tokens: int = 24
) -> str:
    completion = live.client(tenant).chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=tokens, temperature=0
    )
    return completion.choices[0].message.content or ""


def test_no_adapter_is_loaded_before_the_first_request_for_it(live: LiveService) -> None:
    loaded = [
        line for line in live.metrics_at_start if "adapters_resident{" in line and 'tier="disk"' not in line
    ]
    assert len(loaded) == len(BASES) * 2  # tiers
    assert {line.rsplit(" ", 1)[1] for line in loaded} == {"0.0"}


def test_a_whole_answer_has_openais_shape_and_its_usage(live: LiveService) -> None:
    completion = live.client().chat.completions.create(**body(max_tokens=5))
    assert completion.object == "chat.completion"
    assert completion.choices[0].finish_reason in ("stop", "length")
    assert completion.usage is not None
    assert (
        completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    )
    assert completion._request_id is not None
    assert completion.id == "chatcmpl-" + completion._request_id.removeprefix("req_")
    event = live.last_event()
    assert event["request_id"] == completion._request_id
    assert event["completion_tokens"] == completion.usage.completion_tokens


def test_a_stream_says_the_same_as_the_whole_answer(live: LiveService) -> None:
    whole = live.client().chat.completions.create(**body(max_tokens=12))
    chunks = list(
        live.client().chat.completions.create(
            **body(max_tokens=12), stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_several_samples_are_told_apart_and_the_prompt_is_paid_once(live: LiveService) -> None:
    completion = live.client().chat.completions.create(**body(n=3, temperature=1.0, max_tokens=6))
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert completion.usage is not None
    event = live.last_event()
    assert (event["samples"], event["prompt_tokens"]) == (3, completion.usage.prompt_tokens)


def test_a_text_completion_continues_its_prompt(live: LiveService) -> None:
    completion = live.client().completions.create(model=TINY, prompt="Once upon a time", max_tokens=3)
    assert completion.object == "text_completion"
    assert completion.usage is not None
    assert completion.usage.completion_tokens <= 3


def test_a_stop_sequence_ends_the_answer_and_what_was_generated_is_counted(live: LiveService) -> None:
    whole = ask(live, LUMEN, TINY, tokens=16)
    stop = whole[len(whole) // 2 :][:3]
    completion = live.client().chat.completions.create(
        model=TINY,
        messages=[{"role": "user", "content": "What is your name?"}],
        max_tokens=16,
        temperature=0,
        stop=[stop],
    )
    assert completion.choices[0].finish_reason == "stop"
    assert stop not in (completion.choices[0].message.content or "")


def test_each_tenant_is_served_its_own_adapter_alone_and_in_mixed_batches(live: LiveService) -> None:
    """Invariant 1, and vLLM 48421: with every slot taken the base must not answer as a customer."""
    cases = [(LUMEN, TINY), (LUMEN, f"{LUMEN}/support"), (TIDEWATER, f"{TIDEWATER}/support")]
    alone = [ask(live, tenant, model) for tenant, model in cases]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(12) as pool:
        mixed = list(pool.map(lambda case: ask(live, *case), cases * 4))
    assert mixed == alone * 4


def test_a_usage_event_names_the_immutable_version_behind_an_alias(live: LiveService) -> None:
    ask(live, LUMEN, f"{LUMEN}/support", tokens=2)
    newest = newest_published(live.settings.adapters_dir, LUMEN, "support")
    event = live.last_event()
    assert event["model"] == f"{LUMEN}/support"
    assert event["adapter_version"] == f"{LUMEN}/support@{newest.name}"
    assert ask(live, LUMEN, f"{LUMEN}/support@{newest.name}") == ask(live, LUMEN, f"{LUMEN}/support")


def test_models_lists_the_bases_and_the_tenants_own_adapters_only(live: LiveService) -> None:
    for tenant in TENANTS:
        names = [model.id for model in live.client(tenant).models.list()]
        assert names[:4] == [*BASES, f"{tenant}/support"]
        assert all(name in BASES or name.startswith(f"{tenant}/") for name in names)
    assert live.client(LUMEN).models.retrieve(f"{LUMEN}/support").owned_by == LUMEN


def test_another_tenants_adapter_and_an_unknown_one_look_the_same(live: LiveService) -> None:
    foreign = live.post(body(model=f"{TIDEWATER}/support"), tenant=LUMEN)
    unknown = live.post(body(model=f"{LUMEN}/nothing"), tenant=LUMEN)
    assert foreign.status_code == unknown.status_code == 404
    assert foreign.json()["error"]["code"] == "model_not_found"

    def blank(text: str) -> str:
        return text.replace(f"{TIDEWATER}/support", "M").replace(f"{LUMEN}/nothing", "M")

    assert blank(foreign.text) == blank(unknown.text)
    for name in (f"{TIDEWATER}/support", "nothing"):
        with pytest.raises(openai.NotFoundError):
            live.client(LUMEN).models.retrieve(name)


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic abc", "Bearer bsk-" + "a" * 43])
def test_without_a_live_key_the_answer_is_401(live: LiveService, header: str | None) -> None:
    headers = {"Authorization": header} if header else {}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body(), headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_revoked_key_is_refused_within_two_seconds(live: LiveService) -> None:
    tenants = Tenants(live.store, server_secret(live.settings.home))
    key, secret = tenants.create_key(LUMEN, at=NOON)
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0)
    client.models.list()
    tenants.revoke_key(key.id, at=NOON)
    time.sleep(2)
    with pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_a_key_without_the_scope_is_refused(live: LiveService) -> None:
    tenants = Tenants(live.store, server_secret(live.settings.home))
    _, secret = tenants.create_key(LUMEN, at=NOON, scopes=frozenset({"billing-read"}))
    with pytest.raises(openai.PermissionDeniedError):
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=secret, max_retries=0).models.list()


@pytest.mark.parametrize(
    ("broken", "status", "param"),
    [
        (b"{", 400, None),
        (b"[]", 400, None),
        (b"[" * 5000, 400, None),
        (body(n=9), 400, "n"),
        (body(messages=HELLO * 300), 400, "messages"),
        (body(messages=[{"role": "user", "content": "word " * 3000}]), 400, "messages"),
        (body(temperature=9), 400, "temperature"),
        (body(tools=[{}]), 400, "tools.0.type"),
        (
            body(response_format=answer_format(PATTERN_AND_LENGTH)),
            400,
            "response_format.json_schema.schema",
        ),
        (body(tools=[tool(PATTERN_AND_LENGTH)]), 400, "tools.0.function.parameters"),
        (body(tools=[tool({"type": "wat"})]), 400, "tools.0.function.parameters"),
        (body(messages=[{"role": "user", "content": "x" * (1 << 20)}]), 413, None),
    ],
    ids=lambda value: None if isinstance(value, dict | bytes) else str(value),
)
def test_a_bad_request_is_refused_and_costs_nothing(
    live: LiveService, broken: Any, status: int, param: str
) -> None:
    before, events = Ledger(live.store).account(LUMEN), live.count_events()
    answer = live.post(broken)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.headers["x-request-id"].startswith("req_")
    assert Ledger(live.store).account(LUMEN) == before
    assert not Ledger(live.store).open_holds()
    assert live.count_events() == events


def test_an_endless_body_is_cut_off_at_the_bound(live: LiveService) -> None:
    def endless() -> Any:
        for _ in range(64):
            yield b" " * (1 << 16)

    answer = httpx.post(
        f"{live.url}/v1/chat/completions",
        content=endless(),
        headers={"Authorization": f"Bearer {live.keys[LUMEN]}"},
        timeout=60,
    )
    assert answer.status_code == 413


def test_unknown_routes_and_methods_are_openai_shaped(live: LiveService) -> None:
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/chat/completions", 405)):
        answer = httpx.request(method, f"{live.url}{path}")
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["/tokenize", "/v1/load_lora_adapter", "/server_info", "/docs", "/ping"])
def test_no_route_of_vllm_or_the_framework_is_reachable(live: LiveService, path: str) -> None:
    assert httpx.get(f"{live.url}{path}").status_code == 404


def test_the_answer_carries_one_request_id_and_never_the_clients(live: LiveService) -> None:
    answer = live.post(body(), **{"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    assert answer.headers["x-request-id"].startswith("req_")
    assert int(answer.headers["openai-processing-ms"]) >= 0


def test_beyond_the_credit_the_answer_is_insufficient_quota(live: LiveService) -> None:
    ledger = Ledger(live.store)
    account = ledger.account(TIDEWATER)
    ledger.open_account(TIDEWATER, account.spent_nanos + 10)
    try:
        with pytest.raises(openai.RateLimitError) as refused:
            ask(live, TIDEWATER, TINY)
    finally:
        ledger.open_account(TIDEWATER, account.credit_nanos)
    assert refused.value.code == "insufficient_quota"


def _leave_stream(live: LiveService) -> None:
    stream = live.client().chat.completions.create(**body(max_tokens=900), stream=True)
    for number, _ in enumerate(stream):
        if number == 4:
            break
    stream.close()


def _leave_whole(live: LiveService) -> None:
    with pytest.raises(httpx.TimeoutException):
        httpx.post(
            f"{live.url}/v1/chat/completions",
            json=body(max_tokens=900),
            headers={"Authorization": f"Bearer {live.keys[LUMEN]}"},
            timeout=0.4,
        )


@pytest.mark.parametrize("leave", [_leave_stream, _leave_whole])
def test_disconnect_settles_generated_tokens_and_stops_the_engine(
    live: LiveService, leave: Callable[[LiveService], None]
) -> None:
    events = live.count_events()
    leave(live)
    wait_until(lambda: live.count_events() == events + 1 and not Ledger(live.store).open_holds())
    event = live.last_event()
    assert event["status"] == "disconnected"
    assert 0 < int(str(event["completion_tokens"])) < 900
    live.assert_reconciled()


def test_many_clients_at_once_leave_nothing_open_and_every_token_billed(live: LiveService) -> None:
    """Invariants 2 and 3 under a mixed load with clients that leave at any moment."""
    events = live.count_events()

    def client(number: int) -> None:
        model = [TINY, f"{LUMEN}/support"][number % 2]
        stream = live.client().chat.completions.create(**body(model=model, max_tokens=40), stream=True)
        for piece, _ in enumerate(stream):
            if number % 3 == 0 and piece == number:
                break
        stream.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    live.wait_idle()
    assert live.count_events() == events + 24
    live.assert_reconciled()


def test_a_new_version_under_the_alias_is_served_at_once(live: LiveService) -> None:
    """The alias moves; the immutable name keeps its bytes (vLLM 42125 is about a reused name)."""
    registry = AdapterRegistry(live.store, [TINY])
    old = newest_published(live.settings.adapters_dir, LUMEN, "support")
    before = ask(live, LUMEN, f"{LUMEN}/support")
    new = retrained(live)
    adapter = register_and_promote(registry, new, live.settings.home)
    wait_until(lambda: registry.state(adapter) == VersionState.READY)
    try:
        after = ask(live, LUMEN, f"{LUMEN}/support")
        assert after != before
        assert ask(live, LUMEN, f"{LUMEN}/support@{old.name}") == before
        assert ask(live, LUMEN, f"{LUMEN}/support@{new.name}") == after
    finally:
        register_and_promote(registry, old, live.settings.home)
    assert ask(live, LUMEN, f"{LUMEN}/support") == before


def retrained(live: LiveService) -> Any:
    from finetune.job import load_job, run
    from tests.support.constants import CONFIGS

    job = load_job(CONFIGS / "demo" / f"{LUMEN}.yaml")
    recipe = job.recipe.model_copy(update={"top_layers": None, "seed": 7})
    again = job.model_copy(update={"base": TINY, "recipe": recipe})
    return run(again, bases=live.settings.bases_dir, adapters=live.settings.adapters_dir).directory


def test_health_names_no_tenant_and_metrics_name_adapters_only_to_this_machine(live: LiveService) -> None:
    assert httpx.get(f"{live.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{live.url}/readyz").json() == {"status": "ready", "bases": sorted(BASES)}
    metrics = httpx.get(f"{live.url}/metrics").text
    assert "bespoke_tokens_total" in metrics
    named = {line.partition("{")[0] for line in metrics.splitlines() if any(name in line for name in TENANTS)}
    assert all(name.startswith("bespoke_adapter_") for name in named)


def test_only_loopback_is_bound(live: LiveService) -> None:
    family = {process.pid for process in psutil.Process().children(recursive=True)}
    listening = [
        connection.laddr.ip
        for connection in psutil.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN and connection.pid in family
    ]
    assert listening
    assert {ip for ip in listening if ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")} == set()


def test_a_gateway_process_loads_neither_torch_nor_vllm(live: LiveService) -> None:
    gateways = live.running_pids("gateway")
    assert gateways
    for pid in gateways.values():
        mapped = {entry.path for entry in psutil.Process(pid).memory_maps()}
        assert not [path for path in mapped if "libtorch" in path or "/vllm/" in path]


def test_the_ledger_agrees_with_the_engines_own_counters(live: LiveService) -> None:
    """Invariant 2 holds over the requests of all tests before this one."""
    live.wait_idle()
    live.assert_reconciled()
