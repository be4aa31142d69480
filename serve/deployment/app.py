"""Builds a gateway's ASGI app from settings: the composition root of one gateway process."""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path

from fastapi import FastAPI

from quantize.card import read_card
from quantize.errors import QuantizeError
from serve.api import (
    admin,
    batches,
    chat,
    completions,
    embeddings,
    errors,
    files,
    health,
    messages,
    models,
    openapi,
    organization,
    responses,
    uploads,
)
from serve.api.cors import BrowserMiddleware
from serve.api.dependencies import Context
from serve.api.middleware import BodyMiddleware, RequestMiddleware, TracingMiddleware, body_bound
from serve.batches.batches import Batches
from serve.batches.input import InputBounds
from serve.batches.worker import BatchWorker
from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.client_data.files import FileBounds, Files
from serve.client_data.idempotency import Idempotency
from serve.engine.protocol import Engine
from serve.errors import StoreUnavailable
from serve.formats.sampling import RequestBounds
from serve.inference.gateway import Gateway
from serve.maintenance.steward import StewardClient
from serve.observability.metrics import ALONE, GatewayPeers, Metrics
from serve.observability.tracing import OFF, tracing_of
from serve.rate_limits import RateLimiter
from serve.registry.registry import AdapterRegistry
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret

log = logging.getLogger(__name__)

KEY_USE_INTERVAL_S = 5.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_app(
    settings: Settings,
    engines: Mapping[str, Engine],
    steward: StewardClient | None = None,
    peers: GatewayPeers | None = None,
) -> FastAPI:
    """Builds the gateway over `engines` (one per base). Migrates the store first.

    /metrics asks `steward`, and the other gateways through `peers`.
    """
    store = Store(settings.store_url)
    store.migrate()
    imported_at = _imported_at(settings.bases_dir, engines)
    registry = AdapterRegistry(store, list(engines), imported_at=imported_at)
    metrics = _metrics(settings, peers.name if peers else ALONE)
    rate_limiter = RateLimiter(store, f"{socket.gethostname()}-{os.getpid()}")
    commit_queue = CommitQueue(Ledger(store), metrics.committed)
    checkpoints = UsageCheckpoints(settings.checkpoints_dir, on_failure=metrics.checkpoint_failed)
    idempotency = Idempotency(store, lease=timedelta(seconds=settings.request_timeout_s + 120))
    tracing = tracing_of(settings.otlp_endpoint, settings.trace_ratio, "gateway")
    secret = server_secret(settings.home)
    gateway = Gateway(
        store=store,
        registry=registry,
        engines=engines,
        rate_limiter=rate_limiter,
        commit_queue=commit_queue,
        checkpoints=checkpoints,
        metrics=metrics,
        request_timeout_s=settings.request_timeout_s,
        first_token_timeout_s=settings.first_token_timeout_s,
        tracing=tracing,
        secret=secret,
    )

    tenants = Tenants(store, secret)

    limits = settings.limits
    bounds = FileBounds(limits.file_bytes, limits.files_per_tenant, limits.files_bytes_per_tenant)
    client_files = Files(store, settings.files_dir, bounds)
    fields = RequestBounds(
        messages=limits.messages,
        n=limits.n,
        stop_sequences=limits.stop_sequences,
        completion_tokens=limits.completion_tokens,
        tools=limits.tools,
        prompts=limits.prompts,
    )
    worker = BatchWorker(
        store=store,
        gateway=gateway,
        tenants=tenants,
        files=client_files,
        bounds=InputBounds(limits.batch_lines, limits.body_bytes, fields),
        requests_in_flight=limits.batch_requests,
        now=gateway.context.now,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        jobs = [
            asyncio.create_task(job)
            for job in (
                rate_limiter.keep_settled(),
                _note_key_use(tenants),
            )
        ]
        worker.start()
        yield
        await worker.stop()
        for job in jobs:
            job.cancel()
        await gateway.drain()
        await asyncio.to_thread(commit_queue.stop)
        await asyncio.to_thread(checkpoints.close)
        await _flush_key_use(tenants)
        await rate_limiter.close()
        store.close()
        await asyncio.to_thread(tracing.close)

    app = FastAPI(title="Bespoke", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.context = Context(
        gateway=gateway,
        tenants=tenants,
        registry=registry,
        engines=engines,
        store=store,
        metrics=metrics,
        limits=fields,
        idempotency=idempotency,
        steward=steward,
        peers=peers,
    )
    files.install(app, client_files, Batches(store, client_files, per_tenant=limits.batches_per_tenant))
    routes = (
        chat,
        completions,
        responses,
        messages,
        embeddings,
        models,
        files,
        uploads,
        batches,
        health,
        organization,
        admin,
    )
    for resource in routes:
        app.include_router(resource.router)
    errors.install(app)
    openapi.install(app)
    sizes = {"body_bytes_max": limits.body_bytes, "file_bytes_max": limits.file_bytes}
    slowest = limits.body_bytes / limits.body_timeout_s
    app.add_middleware(BodyMiddleware, body_bytes_max=body_bound(**sizes), bytes_per_s_min=slowest)
    app.add_middleware(RequestMiddleware, metrics=metrics, **sizes)
    if settings.cors_origins:
        app.add_middleware(BrowserMiddleware, origins=settings.cors_origins)
    if tracing is not OFF:
        app.add_middleware(TracingMiddleware, tracing=tracing)
    return app


def _imported_at(bases_dir: Path, bases: Iterable[str]) -> dict[str, datetime]:
    """When each base was imported, as its card says. A base whose card is not here is left out."""
    times = {}
    for base in bases:
        with contextlib.suppress(QuantizeError, OSError):  # its engine reads the card, and refuses it
            times[base] = read_card(bases_dir / base).created_at
    return times


def _metrics(settings: Settings, gateway: str) -> Metrics:
    """Builds the metrics. Adapters' names tell who the customers are, so only the operator sees them."""
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    private = token is not None or settings.host in LOOPBACK
    adapters_max = settings.metrics_adapters if private else 0
    return Metrics(adapters_max=adapters_max, token=token, gateway=gateway)


async def _note_key_use(tenants: Tenants) -> None:
    """Stores when keys were last used, a few seconds late and many at a time. Never returns."""
    while True:
        await asyncio.sleep(KEY_USE_INTERVAL_S)
        await _flush_key_use(tenants)


async def _flush_key_use(tenants: Tenants) -> None:
    for key_cache in (tenants.key_cache, tenants.platform_key_cache):
        with contextlib.suppress(StoreUnavailable):  # they are stored the next time
            await asyncio.to_thread(key_cache.flush)
