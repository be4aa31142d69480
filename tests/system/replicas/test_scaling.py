"""Gateways and engines follow the load up and down, are replaced by a redeployment, and lose no stream."""

from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import httpx
import psutil
import pytest

from tests.support.constants import TINY
from tests.support.live_service import HELLO
from tests.support.streamed_request import StreamedRequest
from tests.support.waiting import wait_until
from tests.system.replicas.replica_service import (
    ELASTIC_SEQUENCES,
    ENGINE,
    GATEWAY,
    REQUESTS_PER_REPLICA,
    ReplicaService,
)

pytestmark = pytest.mark.slow

STREAMS = REQUESTS_PER_REPLICA + 2
STARTED_S_MAX, STOPPED_S_MAX = 240.0, 120.0
BODY: dict[str, Any] = {
    "model": TINY,
    "messages": HELLO,
    "max_tokens": 900,
    "temperature": 0,
    "logit_bias": {"2": -100},  # <|im_end|>: the streams are to last
}


def counts(service: ReplicaService) -> tuple[int, int]:
    """How many gateways and engine replicas serve."""
    return len(service.running_pids(GATEWAY)), len(service.running_pids(ENGINE))


def test_replicas_follow_the_load_up_and_down_and_no_stream_is_lost(elastic: ReplicaService) -> None:
    assert counts(elastic) == (1, 1)
    streams: list[StreamedRequest] = []

    def grown() -> bool:
        """Keeps STREAMS of them going."""
        going = sum(not stream.ended for stream in streams)
        streams.extend(StreamedRequest(elastic, BODY) for _ in range(STREAMS - going))
        return counts(elastic) == (2, 2)

    wait_until(grown, STARTED_S_MAX, 0.2)
    # Streams that begin while there are two go to both, and see one of each go.
    streams.extend(StreamedRequest(elastic, BODY) for _ in range(STREAMS))
    for stream in streams:
        stream.wait_ended()
    assert {(stream.finish_reason, stream.tokens, stream.error_code) for stream in streams} == {
        ("length", BODY["max_tokens"], None)
    }
    last: list[StreamedRequest] = []

    def shrunk() -> bool:
        """Keeps a stream or two going: those are never the reason for a second replica."""
        if all(stream.ended for stream in last[-2:]):
            last.append(StreamedRequest(elastic, BODY | {"max_tokens": 200}))
        return counts(elastic) == (1, 1)

    wait_until(shrunk, STOPPED_S_MAX, 0.2)
    for stream in last:
        stream.wait_ended()
    assert {(stream.finish_reason, stream.tokens, stream.error_code) for stream in last} == {
        ("length", 200, None)
    }
    elastic.assert_reconciled()


def test_a_replica_that_is_told_to_stop_ends_its_streams_first(elastic: ReplicaService) -> None:
    """Redeployed as two replicas, which replaces the gateway and the engine; last in this file for that."""
    old_engines, old_gateways = elastic.running_pids(ENGINE), elastic.running_pids(GATEWAY)
    old_pids = [*old_engines.values(), *old_gateways.values()]
    body = BODY | {"model": elastic.adapters[0].model, "max_tokens": 300}
    # More than fit in the replica's batch: some have no token yet when it is told to stop.
    streams = [StreamedRequest(elastic, body) for _ in range(REQUESTS_PER_REPLICA)]
    running = "bespoke_vllm_requests_running"
    wait_until(lambda: list(elastic.samples(running).values()) == [ELASTIC_SEQUENCES], 30)
    redeployed_s = monotonic()
    with ThreadPoolExecutor(1) as pool:
        redeployed = pool.submit(elastic.deploy_pair)  # takes as long as a new engine's start
        for stream in streams:
            stream.wait_ended()
            assert (stream.error_code, stream.finish_reason) == (None, "length")
            event = elastic.event(stream.request_id)
            assert (event["status"], event["completion_tokens"]) == ("complete", 300)
            assert event["replica"] in old_engines
        left_s = redeployed_s + elastic.settings.drain_timeout_s + 15 - monotonic()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in old_pids), left_s)
        redeployed.result(180)
    wait_until(lambda: httpx.get(f"{elastic.url}/readyz", timeout=60).status_code == 200, 180, 0.5)
    response = elastic.post(body | {"max_tokens": 4})
    assert response.status_code == 200, response.text
    assert elastic.event(response.headers["x-request-id"])["replica"] not in old_engines
    wait_until(lambda: list(elastic.adapters_on_disk().values()) == [len(elastic.adapters)] * 2, 60)
    elastic.wait_idle()
    elastic.assert_reconciled()
