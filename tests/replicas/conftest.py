"""One gateway in front of two real engine replicas of one base, with four adapters of one tenant."""

import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from loadtests.synthetic import publish_random
from serve.billing.metering.events import usage_table
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion, VersionState
from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from tests.serve.conftest import (
    TENANTS,
    TINY,
    Live,
    enter,
    free_port,
    import_tiny,
    onboard,
    wait_until,
)
from tests.support.serve_details import live_replicas

TENANT = TENANTS[0]
NAMES = ("one", "two", "three", "four")
SEQUENCES = 2  # in a replica's batch; the requests behind them have no token yet


class Stream:
    """One streamed request, read by a thread of its own from now on."""

    def __init__(self, live: Live, body: dict[str, Any]) -> None:
        self.request_id = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self.error: dict[str, Any] | None = None
        self._live = live
        self._body = body | {"stream": True}
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def wait_begun(self) -> None:
        assert self._begun.wait(60), "the stream did not begin in time"

    def wait_ended(self) -> None:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream did not end in time"

    def _read(self) -> None:
        url, keys = f"{self._live.url}/v1/chat/completions", self._live.keys
        headers = {"Authorization": f"Bearer {keys[TENANT]}"}
        with httpx.stream("POST", url, json=self._body, headers=headers, timeout=120) as answer:
            self.request_id = answer.headers["x-request-id"]
            for line in answer.iter_lines():
                if line and line != "data: [DONE]":
                    self._take(json.loads(line.removeprefix("data: ")))

    def _take(self, event: dict[str, Any]) -> None:
        self.error = event.get("error")
        for choice in event.get("choices", ()):
            self.finish_reason = choice["finish_reason"]
            if choice["delta"].get("role") is None:
                # Several that came at once are one piece; with log-probabilities each is told.
                self.tokens += len(choice["logprobs"]["content"]) if choice["logprobs"] else 1
                self._begun.set()


@dataclass(frozen=True)
class Pair(Live):
    """The two replicas, told apart by the ids that usage events bear."""

    adapters: tuple[AdapterVersion, ...]

    def publish(self, name: str, seed: int) -> Path:
        base_dir = self.settings.bases_dir / TINY
        return publish_random(
            base_dir, self.settings.adapters_dir, tenant=TENANT, name=name, seed=seed, size=0.5
        )

    def event(self, request_id: str) -> dict[str, Any]:
        """The one usage event of a request, once it is settled."""

        def found() -> list[dict[str, Any]]:
            with self.store.read() as connection:
                query = sa.select(usage_table).where(usage_table.c.request_id == request_id)
                return [dict(row) for row in connection.execute(query).mappings()]

        wait_until(lambda: bool(found()))
        (event,) = found()
        return event

    def samples(self, metric: str, **labels: str) -> dict[str, float]:
        """A metric's value by replica; of an engine that is down there is none."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {
            sample.labels.get("replica", ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        }

    def on_disk(self) -> dict[str, float]:
        return self.samples("bespoke_adapters_resident", tier="disk")

    def pids(self) -> dict[str, int]:
        """The live engine replicas' processes."""
        return {replica["replica_id"]: replica["pid"] for replica in live_replicas(f"engine-{TINY}")}


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    from serve.deployment.local import LocalService

    home = tmp_path_factory.mktemp("pair")
    import_tiny(home)
    settings = Settings(
        home=home,
        port=free_port(),
        bases=[TINY],
        engine_replicas=2,
        engine=EngineSettings(
            dtype="float32", max_model_len=1024, max_loras=2, max_num_seqs=SEQUENCES, enforce_eager=True
        ),
    )
    with contextlib.closing(Store(settings.store_url)) as store:
        keys = onboard(store, home, [TENANT])
        pair = Pair(f"http://127.0.0.1:{settings.port}", settings, store, keys, ())
        registry = AdapterRegistry(store, [TINY])
        adapters = tuple(enter(registry, pair.publish(name, seed), home) for seed, name in enumerate(NAMES))
        with LocalService(settings):
            assert {registry.state(adapter) for adapter in adapters} == {VersionState.READY}
            yield Pair(pair.url, settings, store, pair.keys, adapters)
