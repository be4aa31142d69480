"""One trace through all processes: real Ray Serve and vLLM, in a service of its own."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from tests.serve.conftest import TENANTS, TINY, free_port, import_tiny, onboard
from tests.support.collector import Collector
from tests.support.logs import LogFiles

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MARKER = "the-customer-s-own-words"
CHAT = "/v1/chat/completions"
BODY = {"model": TINY, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 5}
LOG_SUFFIXES = {".log", ".out", ".err", ".json", ".txt"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.mark.slow
def test_gateway_and_vllm_tell_one_trace(tmp_path: Path, collector: Collector) -> None:
    """Real Ray Serve and vLLM. And what all their processes log, Ray's own files included."""
    from serve.deployment.local import LocalService

    import_tiny(tmp_path)
    settings = Settings(
        home=tmp_path,
        port=free_port(),
        bases=[TINY],
        otlp_endpoint=collector.endpoint,
        engine=EngineSettings(dtype="float32", max_model_len=1024, max_loras=0, enforce_eager=True),
    )
    store = Store(settings.store_url)
    keys = onboard(store, tmp_path, TENANTS[:1])
    key = keys[TENANTS[0]]
    headers = {"authorization": f"Bearer {key}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    with LocalService(settings) as service:
        good = httpx.post(f"{service.url}{CHAT}", json=BODY, headers=headers, timeout=120)
        long = BODY | {"messages": [{"role": "user", "content": f"{MARKER} " * 900}]}
        refused = httpx.post(f"{service.url}{CHAT}", json=long, headers=headers, timeout=120)
        llm = collector.wait_for(lambda span: span.name == "llm_request" and span.trace == TRACE)
        generation = collector.wait_for(lambda span: span.id == llm.parent)
        server = collector.wait_for(lambda span: span.id == generation.parent)
        assert service._folder is not None
        ray_files = [
            path for path in service._folder.rglob("*") if path.is_file() and path.suffix in LOG_SUFFIXES
        ]
        for path in ray_files:
            assert MARKER not in path.read_text(errors="replace"), path
            assert key not in path.read_text(errors="replace"), path
    store.close()
    assert (good.status_code, refused.status_code) == (200, 400)
    assert (server.name, server.parent, server.service) == (f"POST {CHAT}", PARENT, "bespoke-gateway")
    assert (generation.name, llm.service) == (f"chat {TINY}", "bespoke-engine")
    assert generation.start_ns <= llm.start_ns
    request_id = good.headers["x-request-id"]
    assert llm.attributes["gen_ai.request.id"] == request_id
    assert ray_files
    log_files = LogFiles(settings.logs_dir)
    assert {name.rstrip("0123456789-") for name in log_files.files} >= {"gateway", "engine-tiny", "steward"}
    answered = [record for record in log_files.of(request_id) if record["message"] == "answered"]
    assert [(record["status"], record["trace_id"]) for record in answered] == [(200, TRACE)]
    for word in (MARKER, key):
        assert word not in log_files.text
    assert MARKER.encode() not in b"".join(collector.bodies)
