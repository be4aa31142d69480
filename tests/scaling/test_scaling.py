"""Gateways and engines that follow the load, in a service of their own: up, down, and no stream lost."""

import contextlib
from collections.abc import Iterator

import pytest

from serve.settings import EngineSettings, ScalingSettings, Settings
from serve.storage.database import Store
from tests.replicas.conftest import TENANT, Stream
from tests.serve.conftest import TINY, Live, free_port, import_tiny, onboard, wait_until
from tests.serve.test_live import HELLO, assert_reconciled
from tests.support.serve_details import live_replicas

pytestmark = pytest.mark.slow

STREAMS = 8
SCALING = ScalingSettings(replicas_max=2, requests_per_replica=3, up_after_s=1, down_after_s=3)
STARTED_S_MAX, STOPPED_S_MAX = 240.0, 120.0
BODY = {
    "model": TINY,
    "messages": HELLO,
    "max_tokens": 900,
    "temperature": 0,
    "logit_bias": {"2": -100},  # <|im_end|>: they are to last
    "logprobs": True,  # then every token is told, half characters too
}


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    from serve.deployment.local import LocalService

    home = tmp_path_factory.mktemp("elastic")
    import_tiny(home)
    settings = Settings(
        home=home,
        port=free_port(),
        bases=[TINY],
        gateway_scaling=SCALING,
        engine_scaling=SCALING,
        engine=EngineSettings(
            dtype="float32", max_model_len=1024, max_loras=0, max_num_seqs=STREAMS, enforce_eager=True
        ),
    )
    with contextlib.closing(Store(settings.store_url)) as store:
        keys = onboard(store, home, [TENANT])
        with LocalService(settings) as service:
            yield Live(service.url, settings, store, keys)


def running(deployment: str) -> set[int]:
    """The processes of a deployment's replicas that serve."""
    return {replica["pid"] for replica in live_replicas(deployment) if replica["state"] == "RUNNING"}


def test_replicas_follow_the_load_up_and_down_and_no_stream_is_lost(elastic: Live) -> None:
    engines, gateways = f"engine-{TINY}", "gateway"
    assert len(running(engines)) == len(running(gateways)) == 1
    streams: list[Stream] = []

    def grown() -> bool:
        """Keeps STREAMS of them going."""
        ended = [stream for stream in streams if not stream._thread.is_alive()]
        streams.extend(Stream(elastic, BODY) for _ in range(STREAMS - len(streams) + len(ended)))
        return len(running(engines)) == len(running(gateways)) == 2

    wait_until(grown, STARTED_S_MAX, 0.2)
    # Those that run while there are two are of both, and see one of each go.
    streams.extend(Stream(elastic, BODY) for _ in range(STREAMS))
    for stream in streams:
        stream.wait_ended()
    assert {(stream.finish_reason, stream.tokens, stream.error) for stream in streams} == {
        ("length", BODY["max_tokens"], None)
    }
    last: list[Stream] = []

    def shrunk() -> bool:
        """A stream or two all the time: those are never the reason for a second replica."""
        if all(not stream._thread.is_alive() for stream in last[-2:]):
            last.append(Stream(elastic, BODY | {"max_tokens": 200}))
        return len(running(engines)) == len(running(gateways)) == 1

    wait_until(shrunk, STOPPED_S_MAX, 0.2)
    for stream in last:
        stream.wait_ended()
    assert {(stream.finish_reason, stream.tokens, stream.error) for stream in last} == {("length", 200, None)}
    assert_reconciled(elastic)
