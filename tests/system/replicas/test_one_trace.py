"""One trace goes through all processes of real Ray Serve and vLLM, and no log holds a customer's words."""

import httpx
import pytest

from tests.support.collector import Collector
from tests.support.constants import TINY
from tests.support.logs import LogFiles
from tests.system.replicas.replica_service import TENANT, ReplicaService

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
MARKER = "the-customer-s-own-words"
CHAT = "/v1/chat/completions"
BODY = {"model": TINY, "messages": [{"role": "user", "content": MARKER}], "max_tokens": 5}
LOG_SUFFIXES = {".log", ".out", ".err", ".json", ".txt"}


@pytest.mark.slow
def test_gateway_and_vllm_tell_one_trace(elastic: ReplicaService, collector: Collector) -> None:
    """And the logs of all their processes, Ray's own files included, hold no key and no prompt."""
    key = elastic.keys[TENANT]
    headers = {"authorization": f"Bearer {key}", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    answered = httpx.post(f"{elastic.url}{CHAT}", json=BODY, headers=headers, timeout=120)
    too_long = BODY | {"messages": [{"role": "user", "content": f"{MARKER} " * 900}]}
    refused = httpx.post(f"{elastic.url}{CHAT}", json=too_long, headers=headers, timeout=120)
    assert (answered.status_code, refused.status_code) == (200, 400)

    llm = collector.wait_for(lambda span: span.name == "llm_request" and span.trace == TRACE)
    generation = collector.wait_for(lambda span: span.id == llm.parent)
    server = collector.wait_for(lambda span: span.id == generation.parent)
    assert (server.name, server.parent, server.service) == (f"POST {CHAT}", PARENT, "bespoke-gateway")
    assert (generation.name, llm.service) == (f"chat {TINY}", "bespoke-engine")
    assert generation.start_ns <= llm.start_ns
    request_id = answered.headers["x-request-id"]
    assert llm.attributes["gen_ai.request.id"] == request_id

    logs = LogFiles(elastic.settings.logs_dir)
    assert {name.rstrip("0123456789-") for name in logs.files} >= {"gateway", "engine-tiny", "steward"}
    records = [record for record in logs.of(request_id) if record["message"] == "answered"]
    assert [(record["status"], record["trace_id"]) for record in records] == [(200, TRACE)]

    ray_logs = [
        path for path in elastic.ray_folder.rglob("*") if path.is_file() and path.suffix in LOG_SUFFIXES
    ]
    assert ray_logs
    for word in (MARKER, key):
        assert word not in logs.text
        for path in ray_logs:
            assert word not in path.read_text(errors="replace"), path
    assert MARKER.encode() not in b"".join(collector.bodies)
