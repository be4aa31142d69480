"""Web pages of allowed origins can call the API, and read its errors; pages of others cannot."""

from pathlib import Path

import httpx
import pydantic
import pytest

from serve.settings import Settings
from tests.support.scripted_app import HELLO, ScriptedApp

PATH = "/v1/chat/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
# As the OpenAI and Anthropic clients send them from a browser.
SENT = (
    "anthropic-beta, anthropic-dangerous-direct-browser-access, anthropic-version, authorization, "
    "content-type, idempotency-key, openai-beta, openai-organization, x-api-key, x-stainless-arch, "
    "x-stainless-retry-count, x-stainless-runtime-version"
)
ALLOWED = "access-control-allow-origin"


def preflight(played: ScriptedApp, origin: str, method: str = "POST", path: str = PATH) -> httpx.Response:
    return played.ask(
        "OPTIONS",
        path,
        **{
            "origin": origin,
            "access-control-request-method": method,
            "access-control-request-headers": SENT,
        },
    )


def test_by_default_only_pages_of_this_machine_may_call(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    here = ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:5173"]
    elsewhere = [
        "https://app.example",
        "http://localhost.evil.example",
        "http://localhost:3000.evil.example",
        "http://evil.example/http://localhost:3000",
        "null",
    ]
    for origin in (*here, *elsewhere):
        allowed = origin if origin in here else None
        assert preflight(played, origin).headers.get(ALLOWED) == allowed
        answer = played.ask("POST", PATH, ASK, origin=origin)
        assert (answer.status_code, answer.headers.get(ALLOWED)) == (200, allowed)


def test_a_preflight_allows_what_clients_send_and_no_credentials(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO, cors_origins=["https://app.example"])
    asked = preflight(played, "https://app.example", "DELETE", "/v1/files/file-1")
    assert asked.headers["access-control-allow-headers"] == SENT
    assert "DELETE" in asked.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in asked.headers
    assert preflight(played, "http://localhost:3000").status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_can_read_an_answers_headers(tmp_path: Path, stream: bool) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    answer = played.ask("POST", PATH, ASK | {"stream": stream}, origin="http://localhost:1")
    exposed = answer.headers["access-control-expose-headers"].split(", ")
    assert {"x-request-id", "retry-after", "x-ratelimit-remaining-tokens"} <= set(exposed)
    assert answer.headers["vary"] == "Origin"
    assert "Hel" in answer.text


def test_errors_can_be_read_by_a_page_too(tmp_path: Path) -> None:
    played = ScriptedApp(tmp_path, HELLO)
    page = {"origin": "http://localhost:1"}
    errors = [
        played.ask("POST", PATH, ASK, **page, authorization="Bearer no"),
        played.ask("POST", PATH, {}, **page),
        played.ask("POST", "/v1/nothing", {}, **page),
        played.ask("POST", PATH, ASK, **page, **{"content-encoding": "br"}),
        played.ask("POST", PATH, ASK, **page, **{"x-long": "x" * 20_000}),
        played.ask("POST", PATH, ASK | {"user": "x" * 2_000_000}, **page),
    ]
    assert [error.status_code for error in errors] == [401, 400, 404, 415, 431, 413]
    assert {error.headers[ALLOWED] for error in errors} == {"http://localhost:1"}


def test_other_clients_see_nothing_of_it(tmp_path: Path) -> None:
    answer = ScriptedApp(tmp_path, HELLO).ask("POST", PATH, ASK)
    assert not [name for name in answer.headers if name.startswith("access-control") or name == "vary"]


def test_it_can_be_switched_off_or_opened_to_all(tmp_path: Path) -> None:
    closed = ScriptedApp(tmp_path / "closed", HELLO, cors_origins=[])
    assert preflight(closed, "http://localhost:3000").status_code == 405
    opened = ScriptedApp(tmp_path / "opened", HELLO, cors_origins=["*"])
    assert preflight(opened, "https://any.example").headers[ALLOWED] == "*"
    assert opened.ask("POST", PATH, ASK, origin="https://any.example").headers[ALLOWED] == "*"


@pytest.mark.parametrize(
    "origin", ["app.example", "https://app.example/", "https://*.example", "ftp://a", ""]
)
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        Settings(cors_origins=[origin])
