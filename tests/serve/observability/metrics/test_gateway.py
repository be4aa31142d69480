"""Checks adapters in /metrics: as many as the bound, and only for the operator."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr, ValidationError

from serve.billing.pricing.plans import Tokens
from serve.deployment.app import build_app
from serve.observability.metrics import Metrics
from serve.settings import Settings
from tests.support.constants import TINY
from tests.support.scripted_app import BROKEN, HELLO, LEFT, Json, ScriptedApp, ScriptedEngine

TOKEN = "let-me-see-é"
WIDE = "0.0.0.0"


def read(home: Path, host: str, token: str | None = None, **headers: str | bytes) -> httpx.Response:
    """/metrics of a gateway that has served one adapter and the base."""
    settings = Settings(home=home, host=host, metrics_token=SecretStr(token) if token else None)
    app = build_app(settings, {"tiny": ScriptedEngine(HELLO)})
    app.state.context.metrics.closed("tiny", "acme/support@1", "complete")
    app.state.context.metrics.closed("tiny", None, "complete")
    with TestClient(app) as client:
        return client.get("/metrics", headers=headers)


def requests(metrics: Metrics, adapter: str) -> float | None:
    labels = {"base": "tiny", "adapter": adapter, "status": "complete"}
    return metrics.registry.get_sample_value("bespoke_adapter_requests_total", labels)


def test_the_first_adapters_are_named_and_all_later_ones_are_other() -> None:
    metrics = Metrics(adapters_max=2)
    for adapter in ("acme/a@1", "acme/b@1", "acme/c@1", "acme/d@1", "acme/a@1", None):
        metrics.closed("tiny", adapter, "complete")
    counts = {name: requests(metrics, name) for name in ("acme/a@1", "acme/b@1", "other", "none")}
    assert counts == {"acme/a@1": 2, "acme/b@1": 1, "other": 2, "none": 1}
    assert requests(metrics, "acme/c@1") is None


def test_the_bound_holds_over_all_of_an_adapters_metrics_together() -> None:
    metrics = Metrics(adapters_max=1)
    metrics.ttft("tiny", "acme/a@1", 0.2)
    metrics.tokens("tiny", "acme/b@1", Tokens(3, 1, 2))
    metrics.closed("tiny", "acme/c@1", "void")
    labels = {
        s.labels["adapter"] for f in metrics.registry.collect() for s in f.samples if "adapter" in s.labels
    }
    assert labels == {"acme/a@1", "other"}


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_without_a_token_adapters_are_named_on_loopback(tmp_path: Path, host: str) -> None:
    assert 'adapter="acme/support@1"' in read(tmp_path, host).text


def test_without_a_token_no_adapter_is_named_to_the_network(tmp_path: Path) -> None:
    answer = read(tmp_path, WIDE)
    assert answer.status_code == 200
    assert "acme" not in answer.text
    assert 'adapter="other"' in answer.text
    assert 'adapter="none"' in answer.text


def test_with_the_token_adapters_are_named(tmp_path: Path) -> None:
    answer = read(tmp_path, WIDE, TOKEN, authorization=f"Bearer {TOKEN}".encode())
    assert 'adapter="acme/support@1"' in answer.text


@pytest.mark.parametrize("host", [WIDE, "127.0.0.1"])
@pytest.mark.parametrize(
    "given", [None, "", "Bearer", "Bearer ", "Bearer let-me", f"Basic {TOKEN}", "Bearer é"]
)
def test_a_token_that_is_set_must_be_presented(tmp_path: Path, host: str, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode()}
    answer = read(tmp_path, host, TOKEN, **headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "bespoke_" not in answer.text


def test_the_token_comes_from_the_environment_and_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESPOKE_METRICS_TOKEN", TOKEN)
    settings = Settings()
    assert settings.metrics_token is not None
    assert settings.metrics_token.get_secret_value() == TOKEN
    assert TOKEN not in repr(settings)


def test_an_empty_token_is_refused_rather_than_letting_everyone_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BESPOKE_METRICS_TOKEN", "")
    with pytest.raises(ValidationError):
        Settings()


ASKED = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}),
]


def broken(scripted_app: ScriptedApp, route: str) -> tuple[float, float]:
    """Reads how many streams of `route` broke off, and how many engines failed, from the metrics."""
    value = scripted_app.app.state.context.metrics.registry.get_sample_value
    failed = {"type": "server_error", "code": "engine_failed"}
    return (
        value("bespoke_streams_broken_total", {"route": route}) or 0,
        value("bespoke_errors_total", failed) or 0,
    )


@pytest.mark.parametrize(("route", "body"), ASKED)
def test_a_stream_that_breaks_off_is_an_error_although_its_status_is_200(
    tmp_path: Path, route: str, body: Json
) -> None:
    scripted_app = ScriptedApp(tmp_path, HELLO, BROKEN, BROKEN)
    for count in (0, 1):
        assert scripted_app.ask("POST", route, body | {"model": TINY, "stream": True}).status_code == 200
        assert broken(scripted_app, route) == (count, count)
    assert scripted_app.ask("POST", route, body | {"model": TINY}).status_code == 500
    assert broken(scripted_app, route) == (1, 2)


def test_a_client_that_leaves_during_its_upload_is_no_failure_of_the_service(tmp_path: Path) -> None:
    scripted_app = ScriptedApp(tmp_path, HELLO)
    messages: Iterator[Json]

    async def receive() -> Json:
        return next(messages)

    async def send(_message: Any) -> None:
        pass

    for route, _ in ASKED:
        messages = iter(
            [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
        )
        scripted_app.run(scripted_app.app(scripted_app.scope(route), receive, send))
        value = scripted_app.app.state.context.metrics.registry.get_sample_value
        assert value("bespoke_requests_total", {"route": route, "code": "499"}) == 1


def test_what_nobody_expected_is_answered_with_the_requests_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def bug(*_: object) -> None:
        raise RuntimeError("a bug")

    scripted_app = ScriptedApp(tmp_path, HELLO)
    monkeypatch.setattr(scripted_app.gateway, "generate", bug)
    ((route, body), *_) = ASKED
    answer = scripted_app.ask("POST", route, body | {"model": TINY})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_client_that_leaves_breaks_no_stream(tmp_path: Path) -> None:
    scripted_app = ScriptedApp(tmp_path, LEFT)
    ((route, body), *_) = ASKED
    scripted_app.leave(route, body | {"model": TINY, "stream": True}, after=b"Hel")
    assert broken(scripted_app, route) == (0, 0)
