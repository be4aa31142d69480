"""Defines the Ray Serve deployments and wires them: the composition root of the service.

Only this module and `local.py`, which starts and ends the service, import ray at their top.
"""

import asyncio
import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantize.card import BaseCard, read_card, verify
from quantize.errors import CardMissing
from serve.billing.metering.terms import RequestUsage
from serve.deployment import upstream
from serve.deployment.app import LOOPBACK
from serve.deployment.autoscaling import REQUESTS
from serve.engine.adapters.reconciler import Reconciler
from serve.engine.client import RemoteEngine
from serve.engine.protocol import Counters, GenerationRequest, Take
from serve.engine.transport.frames import Address, Hello
from serve.engine.transport.gateway_side import ReplicaListener
from serve.engine.transport.replica_side import ReplicaServer
from serve.engine.vllm.engine import VllmEngine
from serve.engine.vllm.pooling import PoolingEngine
from serve.engine.vllm.setup import compute_on_one_thread
from serve.engine.vllm.upstream import read_variables_once
from serve.errors import BespokeError, EngineLost, EngineUnavailable, OperatorError
from serve.maintenance.steward import StewardStatus
from serve.observability import logs
from serve.observability.metrics import Exposition, Metrics
from serve.registry.registry import AdapterRegistry
from serve.settings import ScalingSettings, Settings
from serve.storage.database import Store

os.environ.update(upstream.RAY_VARIABLES | os.environ)

import ray
from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

log = logging.getLogger(__name__)

APP_NAME, GATEWAY_NAME = "bespoke", "gateway"
LOOPBACK_ADDRESS = "127.0.0.1"
# Calls of gateways and the steward to a replica at a time. Requests go through `serve.engine.transport`.
CONTROL_CALLS = 256
STEWARD_TIMEOUT_S = 3.0
PEERS_TIMEOUT_S = 2.0
HEALTH_CHECK_PERIOD_S = 2  # a dead process is noticed within this time


class EngineDeployment:
    """Runs one vLLM replica of one base. Its process ends with its engine, and Serve starts another."""

    async def __init__(self, settings: Settings, base: str) -> None:  # type: ignore[misc] # Serve awaits it
        _keep_replica_port_on(settings.host)
        logs.install_with_children(log_spec(settings), f"engine-{base}")
        replica = ray_serve.get_replica_context().replica_id.unique_id
        directories = settings.bases_dir / base, settings.adapters_dir
        self._drain_timeout_s = settings.drain_timeout_s
        engine = PoolingEngine if read_card(directories[0]).embedding is not None else VllmEngine
        self._engine = await engine.start(
            base, *directories, settings.engine_here, replica, settings.otlp_endpoint
        )
        compute_on_one_thread()
        read_variables_once()
        store = Store(settings.store_url)
        store.migrate()
        registry = AdapterRegistry(store, settings.bases)
        self._reconciler = Reconciler(registry, self._engine, base, lambda: datetime.now(UTC))
        await self._reconciler.reconcile()  # a new replica serves the same set as the one before
        self._background = asyncio.create_task(self._reconciler.run())
        self._replica_server = ReplicaServer(self, Hello(base, replica, settings.limits.ongoing_requests))
        _freeze_loaded_objects()

    async def connect(self, gateway: Address) -> None:
        """Connects to `gateway`, which sends its requests over this connection from then on."""
        await self._replica_server.connect(gateway)

    @property
    def loaded_adapters(self) -> list[int]:
        return self._engine.loaded_adapters

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        with _exit_if_engine_lost():
            await self._engine.generate(request, take)

    async def abort(self, request_id: str) -> None:
        await self._engine.abort(request_id)

    async def final_usage(self, request_id: str) -> RequestUsage | None:
        with _exit_if_engine_lost():
            return await self._engine.final_usage(request_id)

    async def counters(self) -> Counters:
        with _exit_if_engine_lost():
            return await self._engine.counters()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {REQUESTS: self._replica_server.ongoing}

    async def check_health(self) -> None:
        with _exit_if_engine_lost():
            await self._engine.check_health()

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it may be ended while it starts
            await self._replica_server.drain(self._drain_timeout_s)
            self._engine.shutdown()


def _freeze_loaded_objects() -> None:
    """Excludes what is loaded by now from garbage collection: nothing of it will ever be freed."""
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def _exit_if_engine_lost() -> Iterator[None]:
    """Ends this process if its engine is dead.

    Serve treats a replica whose methods raise as alive. For three health checks it would go on to get
    requests for its adapters, retried ones too. One whose process is gone gets none.
    """
    try:
        yield
    except EngineLost:
        log.critical("vLLM's core process has died; this replica ends too")
        os._exit(1)


class StewardDeployment:
    """Runs the one steward. Its process may end at any time, and Serve starts another."""

    def __init__(self, settings: Settings, cards: dict[str, BaseCard], handles: dict[str, Any]) -> None:
        from serve.deployment.steward_app import build_steward

        _keep_replica_port_on(settings.host)
        logs.install(log_spec(settings), "steward")
        self._steward = build_steward(settings, _engines(settings, cards, handles))
        self._running = asyncio.get_running_loop().create_task(self._steward.run())

    async def status(self) -> StewardStatus:
        return await self._steward.status()


class RemoteSteward:
    """Asks the steward for its status; see `serve.maintenance.steward.StewardClient`."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def status(self) -> StewardStatus:
        try:
            async with asyncio.timeout(STEWARD_TIMEOUT_S):
                status: StewardStatus = await self._handle.status.remote()
                return status
        except Exception as error:
            raise EngineUnavailable("The steward is away.") from error


def _engines(
    settings: Settings, cards: dict[str, BaseCard], handles: dict[str, Any]
) -> dict[str, RemoteEngine]:
    listener = ReplicaListener(
        LOOPBACK_ADDRESS if settings.host in LOOPBACK else ray.util.get_node_ip_address()
    )
    return {
        base: RemoteEngine(
            base,
            handle,
            listener,
            context_tokens_max=min(settings.engine.max_model_len, cards[base].max_context_tokens),
            queued_max=settings.limits.queued_requests,
            accept_timeout_s=settings.accept_timeout_s,
            classify=classify,
            embedding_size=facts.size if (facts := cards[base].embedding) else None,
        )
        for base, handle in handles.items()
    }


class RayGatewayPeers:
    """Asks all gateway replicas for their metrics; see `serve.observability.metrics.GatewayPeers`."""

    def __init__(self, wanted: int) -> None:
        self.name: str = ray_serve.get_replica_context().replica_id.unique_id
        self.wanted = wanted

    async def expositions(self) -> list[Exposition | None]:
        gateways = ray_serve.get_deployment_handle(GATEWAY_NAME, APP_NAME)
        try:
            response = gateways.broadcast("exposition")
            results = await response.results_async(timeout_s=PEERS_TIMEOUT_S, return_exceptions=True)
        except Exception as error:  # one gateway that hangs delays the whole broadcast
            log.warning("the other gateways' figures are missing: %r", error)
            return []
        return [result if isinstance(result, Exposition) else None for result in results]


class GatewayDeployment:
    """Runs one gateway replica: an ASGI app and its HTTP server. It loads neither torch nor vLLM."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, settings: Settings, cards: dict[str, BaseCard], handles: dict[str, Any], steward: Any
    ) -> None:
        from serve.deployment.app import build_app
        from serve.deployment.http_server import HttpServer

        _keep_replica_port_on(settings.host)
        logs.install(log_spec(settings), "gateway")
        engines = _engines(settings, cards, handles)
        self._background = [asyncio.create_task(engine.discover()) for engine in engines.values()]
        peers = RayGatewayPeers(settings.gateway_replicas)
        app = build_app(settings, engines, RemoteSteward(steward), peers)
        self._metrics: Metrics = app.state.context.metrics
        self._server = HttpServer(app, settings.host, settings.port, drain_timeout_s=settings.drain_timeout_s)
        await self._server.start()
        _freeze_loaded_objects()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return {REQUESTS: self._server.ongoing}

    async def exposition(self) -> Exposition:
        return await asyncio.to_thread(self._metrics.exposition)

    async def __del__(self) -> None:
        await self._server.stop()


def log_spec(settings: Settings) -> logs.LogSpec:
    return logs.LogSpec(
        str(settings.logs_dir),
        settings.log_format,
        settings.log_level,
        file_bytes=settings.log_file_bytes,
        rotated_files=settings.log_files - 1,
    )


def classify(error: BaseException) -> BespokeError | None:
    """Translates ray's errors into ours; None for any other."""
    if isinstance(error, DeploymentUnavailableError):
        return EngineUnavailable()
    lost = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError, ReplicaUnavailableError)
    return EngineLost() if isinstance(error, lost) else None


def build(settings: Settings) -> Any:
    """Builds the Serve application: one gateway deployment in front of one engine deployment per base.

    Raises OperatorError if a base is not there, QuantizeError if its bytes are not those of its card.
    """
    engine = ray_serve.deployment(EngineDeployment)
    engines, cards = {}, {}
    for base in settings.bases:
        cards[base] = _verified(settings.bases_dir / base)
        engines[base] = engine.options(
            name=f"engine-{base}",
            **_replicas(settings.engine_replicas, settings.engine_scaling),
            max_ongoing_requests=CONTROL_CALLS,
            ray_actor_options={"num_cpus": 0, "num_gpus": _gpus(settings)},
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=30,
            # A replica that has to stop gets no new requests, and this long to end those it has.
            graceful_shutdown_timeout_s=settings.drain_timeout_s,
            graceful_shutdown_wait_loop_s=0.2,
        ).bind(settings, base)
    gateway = ray_serve.deployment(GatewayDeployment).options(
        name=GATEWAY_NAME,
        **_replicas(settings.gateway_replicas, settings.gateway_scaling),
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )
    steward = ray_serve.deployment(StewardDeployment).options(
        name="steward",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        graceful_shutdown_timeout_s=5,
    )
    return gateway.bind(settings, cards, engines, steward.bind(settings, cards, engines))


def _replicas(replicas_min: int, scaling: ScalingSettings) -> dict[str, Any]:
    """Returns Serve's options for a fixed number of replicas, or for one that follows the load."""
    if scaling.replicas_max is None:
        return {"num_replicas": replicas_min}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas_min,
            initial_replicas=replicas_min,
            max_replicas=scaling.replicas_max,
            target_ongoing_requests=scaling.requests_per_replica,
            upscale_delay_s=scaling.up_after_s,
            downscale_delay_s=scaling.down_after_s,
            # The delays damp enough. A longer window would only make both longer.
            metrics_interval_s=1,
            look_back_period_s=3,
            policy=AutoscalingPolicy(policy_function="serve.deployment.autoscaling:replicas_for"),
        )
    }


def _keep_replica_port_on(host: str) -> None:
    """Keeps this replica's inter-deployment port on loopback when the service is on loopback."""
    if host in LOOPBACK:
        upstream.keep_replica_port_on_loopback()


def _gpus(settings: Settings) -> int:
    return settings.engine.tensor_parallel_size if settings.engine.device == "gpu" else 0


def _verified(base_dir: Path) -> BaseCard:
    try:
        return verify(base_dir)
    except CardMissing as error:
        raise OperatorError(
            f"There is no base '{base_dir.name}'; make it with: "
            f"bespoke base import configs/bases/{base_dir.name}.yaml"
        ) from error
