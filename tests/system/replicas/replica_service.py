"""A service on the tiny base, with four adapters of one tenant, whose replicas tests count and kill."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families

from loadtests.synthetic import publish_random
from serve.billing.metering.events import usage_table
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion, VersionState
from serve.settings import EngineSettings, ScalingSettings, Settings
from serve.storage.database import Store
from tests.support.billing_fixture import onboard
from tests.support.constants import TENANTS, TINY
from tests.support.live_service import LiveService, import_tiny_bases, register_and_promote
from tests.support.ports import free_port
from tests.support.waiting import wait_until

TENANT = TENANTS[0]
NAMES = ("one", "two", "three", "four")
ENGINE, GATEWAY = f"engine-{TINY}", "gateway"

ELASTIC_SEQUENCES = 4  # in a replica's batch; further requests have no token yet
REQUESTS_PER_REPLICA = 6
SCALING = ScalingSettings(
    replicas_max=2, requests_per_replica=REQUESTS_PER_REPLICA, up_after_s=1, down_after_s=3
)
ELASTIC: dict[str, Any] = {
    "gateway_scaling": SCALING,
    "engine_scaling": SCALING,
    "engine": EngineSettings(
        dtype="float32", max_model_len=1024, max_loras=2, max_num_seqs=ELASTIC_SEQUENCES, enforce_eager=True
    ),
}

PAIR_SEQUENCES = 2
PAIR: dict[str, Any] = {
    "engine_replicas": 2,
    "drain_timeout_s": 5,  # at the end one of them is being replaced, and nobody waits for it
    "engine": EngineSettings(
        dtype="float32", max_model_len=1024, max_loras=2, max_num_seqs=PAIR_SEQUENCES, enforce_eager=True
    ),
}


@dataclass
class _Running:
    """The service that runs, as LocalService, and how it was last deployed."""

    exits: ExitStack = field(default_factory=ExitStack)
    service: Any = None
    layout: dict[str, Any] | None = None


@dataclass(frozen=True)
class ReplicaService(LiveService):
    adapters: tuple[AdapterVersion, ...]
    _running: _Running = field(default_factory=_Running)

    @classmethod
    def prepare(cls, home: Path, otlp_endpoint: str) -> "ReplicaService":
        """Bases, tenant and adapters. Nothing runs before one of the `deploy` methods is called."""
        import_tiny_bases(home)
        settings = Settings(home=home, port=free_port(), bases=[TINY], otlp_endpoint=otlp_endpoint)
        store = Store(settings.store_url)
        keys = onboard(store, home, [TENANT])
        registry = AdapterRegistry(store, [TINY])
        adapters = tuple(
            register_and_promote(registry, _publish(settings, name, seed), home)
            for seed, name in enumerate(NAMES)
        )
        return cls(f"http://127.0.0.1:{settings.port}", settings, store, keys, adapters)

    def deploy_elastic(self) -> None:
        self._deploy(ELASTIC)

    def deploy_pair(self) -> None:
        self._deploy(PAIR)

    def _deploy(self, layout: dict[str, Any]) -> None:
        """Starts the service, or redeploys the running one, which replaces all replicas."""
        if self._running.layout is layout:
            return
        settings = self.settings.model_copy(update=layout)
        if self._running.service is None:
            from serve.deployment.local import LocalService

            self._running.service = self._running.exits.enter_context(LocalService(settings))
            registry = AdapterRegistry(self.store, [TINY])
            assert {registry.state(adapter) for adapter in self.adapters} == {VersionState.READY}
        else:
            from ray import serve as ray_serve

            from serve.deployment.ray_app import APP_NAME, build

            ray_serve.run(build(settings), name=APP_NAME, route_prefix="/")
        self._running.layout = layout

    def stop(self) -> None:
        self._running.exits.close()
        self.store.close()

    @property
    def ray_folder(self) -> Path:
        """Ray's own files, logs among them."""
        folder: Path | None = self._running.service._folder
        assert folder is not None
        return folder

    def publish(self, name: str, seed: int) -> Path:
        return _publish(self.settings, name, seed)

    def event(self, request_id: str) -> dict[str, Any]:
        """The one usage event of a request, once it is settled."""

        def rows() -> list[dict[str, Any]]:
            with self.store.read() as connection:
                query = sa.select(usage_table).where(usage_table.c.request_id == request_id)
                return [dict(row) for row in connection.execute(query).mappings()]

        wait_until(lambda: bool(rows()))
        (event,) = rows()
        return event

    def samples(self, metric: str, **labels: str) -> dict[str, float]:
        """A metric's value by replica; an engine that is down has none."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).text
        return {
            sample.labels.get("replica", ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == metric and labels.items() <= sample.labels.items()
        }

    def adapters_on_disk(self) -> dict[str, float]:
        return self.samples("bespoke_adapters_resident", tier="disk")


def _publish(settings: Settings, name: str, seed: int) -> Path:
    base_dir = settings.bases_dir / TINY
    return publish_random(base_dir, settings.adapters_dir, tenant=TENANT, name=name, seed=seed, size=0.5)
