"""Checks traces as a collector receives them, by real OTLP over HTTP."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes

from serve.engine.protocol import Accepted, Delta, Finished, Message, Sampling
from serve.errors import EngineLost, EngineUnavailable
from serve.inference.request import InferenceRequest
from tests.support.collector import Collector, Received
from tests.support.constants import TINY
from tests.support.ports import free_port
from tests.support.scripted_app import BROKEN, HELLO, LEFT, Script, ScriptedApp

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MARKER = "the-customer-s-own-words"
CHAT = "/v1/chat/completions"
BODY = {"model": TINY, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 5}
SAMPLED = 1
SERVER, CLIENT = 2, 3  # opentelemetry.proto.trace.v1.Span.SpanKind


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


class Traced(ScriptedApp):
    """Runs a gateway that traces. `ended` sends the remaining spans to the collector."""

    def __init__(self, home: Path, endpoint: str, *scripts: Script, **settings: Any) -> None:
        super().__init__(home, *scripts, otlp_endpoint=endpoint, **settings)

    def ended(self) -> None:
        self.gateway.context.tracing.close()


def tree(spans: list[Received]) -> dict[str, list[str]]:
    """parent's name → its children's, in the order in which they began."""
    names = {span.id: span.name for span in spans}
    children: dict[str, list[str]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        children.setdefault(names.get(span.parent, "-"), []).append(span.name)
    return children


def the_only(spans: list[Received], name: str) -> Received:
    (span,) = [span for span in spans if span.name == name]
    return span


def test_a_request_is_a_tree_of_spans_under_the_clients_own(tmp_path: Path, collector: Collector) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    answer = traced.ask("POST", CHAT, BODY, traceparent=f"00-{TRACE}-{PARENT}-01")
    traced.ended()
    spans = collector.spans
    assert tree(spans) == {
        "-": [f"POST {CHAT}"],
        f"POST {CHAT}": ["admission", "hold", f"chat {TINY}"],
        f"chat {TINY}": ["dispatch", "first_token", "generation", "settlement"],
    }
    assert {span.trace for span in spans} == {TRACE}
    server, generation = the_only(spans, f"POST {CHAT}"), the_only(spans, f"chat {TINY}")
    assert (server.parent, server.kind, generation.kind) == (PARENT, SERVER, CLIENT)
    assert not any(span.failed for span in spans)
    request_id = answer.headers["x-request-id"]
    assert server.attributes == {
        http_attributes.HTTP_REQUEST_METHOD: "POST",
        http_attributes.HTTP_ROUTE: CHAT,
        http_attributes.HTTP_RESPONSE_STATUS_CODE: 200,
        url_attributes.URL_SCHEME: "http",
        "bespoke.request_id": request_id,
    }
    attributes = dict(generation.attributes)
    assert attributes.pop(gen_ai_attributes.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK) >= 0
    assert attributes == {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: "chat",
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: "bespoke",
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: TINY,
        gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS: 5,
        gen_ai_attributes.GEN_AI_REQUEST_TEMPERATURE: 1.0,
        gen_ai_attributes.GEN_AI_REQUEST_TOP_P: 1.0,
        gen_ai_attributes.GEN_AI_RESPONSE_MODEL: TINY,
        gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS: ["stop"],
        gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS: 10,
        gen_ai_attributes.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: 4,
        gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS: 2,
        "bespoke.request_id": request_id,
        "bespoke.outcome": "complete",
        "bespoke.attempt": 1,
        "bespoke.replica": "r",
    }


def test_the_steps_of_a_generation_follow_each_other_without_a_gap(
    tmp_path: Path, collector: Collector
) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    traced.say(CHAT, BODY)
    traced.ended()
    generation = the_only(collector.spans, f"chat {TINY}")
    steps = [
        the_only(collector.spans, name) for name in ("dispatch", "first_token", "generation", "settlement")
    ]
    assert [step.start_ns for step in steps[1:]] == [step.end_ns for step in steps[:-1]]
    assert generation.start_ns <= steps[0].start_ns
    assert steps[-1].end_ns <= generation.end_ns


def test_the_engine_gets_the_span_that_its_own_are_under(tmp_path: Path, collector: Collector) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    traced.say(CHAT, BODY)
    traced.ended()
    generation = the_only(collector.spans, f"chat {TINY}")
    (request,) = traced.engine.requests
    assert request.trace_headers is not None
    version, trace, parent, flags = request.trace_headers["traceparent"].split("-")
    assert (version, trace, parent) == ("00", generation.trace, generation.id)
    assert int(flags, 16) & SAMPLED


def test_a_request_that_is_tried_again_has_a_dispatch_for_each_attempt(
    tmp_path: Path, collector: Collector
) -> None:
    traced = Traced(tmp_path, collector.endpoint, [EngineLost()], HELLO)
    traced.say(CHAT, BODY)
    traced.ended()
    dispatches = [span for span in collector.spans if span.name == "dispatch"]
    assert [span.attributes["bespoke.attempt"] for span in dispatches] == [1, 2]
    assert the_only(collector.spans, f"chat {TINY}").attributes["bespoke.attempt"] == 2


@pytest.mark.parametrize(
    ("script", "status", "outcome", "kind"),
    [
        ([EngineUnavailable()], 503, "void", "EngineUnavailable"),
        (BROKEN, 500, "failed", "error"),
    ],
    ids=["before the first token", "in mid stream"],
)
def test_what_failed_says_so_and_not_what_was_said(
    tmp_path: Path, collector: Collector, script: Script, status: int, outcome: str, kind: str
) -> None:
    traced = Traced(tmp_path, collector.endpoint, script)
    assert traced.ask("POST", CHAT, BODY).status_code == status
    traced.ended()
    server, generation = the_only(collector.spans, f"POST {CHAT}"), the_only(collector.spans, f"chat {TINY}")
    assert server.failed
    assert server.attributes[error_attributes.ERROR_TYPE] == str(status)
    assert generation.failed
    assert generation.attributes[error_attributes.ERROR_TYPE] == kind
    assert generation.attributes["bespoke.outcome"] == outcome
    assert {span.message for span in collector.spans} == {""}


def test_a_client_that_leaves_is_an_outcome_and_no_error(tmp_path: Path, collector: Collector) -> None:
    traced = Traced(tmp_path, collector.endpoint, LEFT)
    traced.leave(CHAT, BODY | {"stream": True}, after=b"Hel")
    traced.ended()
    generation = the_only(collector.spans, f"chat {TINY}")
    assert generation.attributes["bespoke.outcome"] == "disconnected"
    assert generation.attributes[gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS] == 3
    assert not generation.failed


def test_a_refusal_is_a_step_that_failed_and_the_clients_fault(tmp_path: Path, collector: Collector) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    assert traced.ask("POST", CHAT, BODY | {"model": MARKER}).status_code == 404
    traced.ended()
    admission = the_only(collector.spans, "admission")
    assert admission.failed
    assert admission.attributes == {error_attributes.ERROR_TYPE: "ModelNotFound"}
    assert not the_only(collector.spans, f"POST {CHAT}").failed


def test_no_span_holds_a_prompt_an_answer_or_a_key(tmp_path: Path, collector: Collector) -> None:
    answer, secret = "the-model-s-own-words", "tenant-secret"
    script: Script = [
        [Accepted("r", "b", 10)],
        [Delta(0, answer, 1, "stop"), Finished(10, 0, 1, aborted=False)],
    ]
    failing: Script = [RuntimeError(MARKER)]
    traced = Traced(tmp_path, collector.endpoint, script, failing)
    traced.say(CHAT, BODY)
    traced.ask("POST", CHAT, BODY, **{"x-secret": secret, "baggage": f"who={secret}"})
    traced.ask("POST", CHAT, BODY | {"temperature": MARKER})
    traced.ask("GET", f"/v1/models/{MARKER}?q={MARKER}")
    traced.ended()
    assert len(collector.spans) > 10
    everything = b"".join(collector.bodies)
    for word in (MARKER, answer, secret, *traced.keys.values()):
        assert word.encode() not in everything


@pytest.mark.parametrize(
    "parents",
    [["00-nonsense-01"], ["00-" + "0" * 32 + f"-{PARENT}-01"], [f"00-{TRACE}-{PARENT}-01"] * 2, ["x" * 9000]],
    ids=["malformed", "zero", "two", "long"],
)
def test_a_parent_that_is_none_begins_a_trace_of_its_own(
    tmp_path: Path, collector: Collector, parents: list[str]
) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(traced.app), base_url="http://here"
        ) as client:
            headers = [("authorization", f"Bearer {traced.keys['acme']}")]
            headers += [("traceparent", parent) for parent in parents]
            return await client.post(CHAT, json=BODY, headers=headers)

    assert traced.run(ask()).status_code == 200
    traced.ended()
    server = the_only(collector.spans, f"POST {CHAT}")
    assert server.parent == ""
    assert server.trace != TRACE


def test_a_client_may_ask_for_less_than_the_ratio_and_never_for_more(
    tmp_path: Path, collector: Collector
) -> None:
    sampled, unsampled = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
    none = Traced(tmp_path / "none", collector.endpoint, HELLO, trace_ratio=0)
    none.ask("POST", CHAT, BODY, traceparent=sampled)
    every = Traced(tmp_path / "every", collector.endpoint, HELLO)
    every.ask("POST", CHAT, BODY, traceparent=unsampled)
    for traced in (none, every):
        traced.ended()
        (request,) = traced.engine.requests
        assert request.trace_headers is not None
        flags = request.trace_headers["traceparent"].rpartition("-")[2]
        assert not int(flags, 16) & SAMPLED  # so that vLLM makes no spans either
    assert not collector.spans


def test_a_generation_that_no_request_is_around_is_one_trace(tmp_path: Path, collector: Collector) -> None:
    """A batch's line has no HTTP request around it."""
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    principal = traced.app.state.context.tenants.key_cache.authenticate(traced.keys["acme"])
    prompt = (Message("user", MARKER),)

    async def generate() -> None:
        async for _ in await traced.gateway.generate(
            principal, InferenceRequest("req_1", TINY, prompt, Sampling(), tier="batch")
        ):
            pass

    traced.run(generate())
    traced.ended()
    steps = ["dispatch", "first_token", "generation", "settlement"]
    assert tree(collector.spans) == {"-": [f"chat {TINY}"], f"chat {TINY}": steps}


def test_probes_and_scrapes_are_not_traced(tmp_path: Path, collector: Collector) -> None:
    traced = Traced(tmp_path, collector.endpoint, HELLO)
    for path in ("/healthz", "/metrics", "/v1/models"):
        traced.ask("GET", path)
    traced.ended()
    assert [span.name for span in collector.spans] == ["GET /v1/models"]


def test_a_collector_that_is_away_or_hangs_fails_no_request_and_holds_up_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "serve.observability.tracing.BATCH_SPANS_MAX", 2
    )  # many batches, each with a time-out of its own
    with socket.socket() as hanging:
        hanging.bind(("127.0.0.1", 0))
        hanging.listen()  # takes connections and never answers
        for number, port in enumerate((free_port(), hanging.getsockname()[1])):
            traced = Traced(tmp_path / str(number), f"http://127.0.0.1:{port}", HELLO)
            for _ in range(3):
                traced.say(CHAT, BODY)
            assert len(traced.bills()) == 3
            began_s = time.monotonic()
            traced.ended()
            assert time.monotonic() - began_s < 10  # the library's own bound is 30


def test_a_queue_that_is_full_drops_spans_and_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.observability.tracing.QUEUE_SPANS_MAX", 8)
    monkeypatch.setattr("serve.observability.tracing.BATCH_SPANS_MAX", 8)
    monkeypatch.setattr("serve.observability.tracing.SEND_INTERVAL_S", 600.0)
    with Collector() as collector:
        traced = Traced(tmp_path, collector.endpoint, HELLO)
        monkeypatch.setattr(  # nothing leaves the queue before the end
            "opentelemetry.sdk._shared_internal.BatchProcessor._should_export_batch",
            lambda processor, *_: processor._shutdown and bool(processor._queue),
        )
        for _ in range(4):
            traced.say(CHAT, BODY)
        traced.ended()
        assert len(collector.spans) == 8


def test_off_means_that_opentelemetry_is_not_even_imported(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from tests.support.scripted_app import HELLO, ScriptedApp
scripted_app = ScriptedApp(Path({str(tmp_path)!r}), HELLO)
scripted_app.say({CHAT!r}, {BODY!r})
(request,) = scripted_app.engine.requests
assert request.trace_headers is None
found = [name for name in sys.modules if name.startswith("opentelemetry")]
assert not found, found
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
