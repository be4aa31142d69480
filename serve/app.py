"""Settings → ASGI app: the composition root of one gateway process."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

from fastapi import FastAPI

from serve.adapters import Catalogue
from serve.api import chat, completions, errors, models, operations
from serve.api.context import Context
from serve.api.edge import Edge
from serve.api.wire import Limits
from serve.db import Store
from serve.engine.base import Engine
from serve.errors import StoreUnavailable
from serve.gateway import Gateway
from serve.metrics import Metrics
from serve.settings import Settings
from serve.tenants import Tenants, server_secret

log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 30.0
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def build_app(settings: Settings, engines: Mapping[str, Engine]) -> FastAPI:
    """The gateway over `engines` (one per base). Migrates the store first."""
    store = Store(settings.store_url)
    store.migrate()
    catalogue = Catalogue(store, list(engines))
    metrics = _metrics(settings)
    gateway = Gateway(
        store=store,
        catalogue=catalogue,
        engines=engines,
        metrics=metrics,
        request_timeout_s=settings.request_timeout_s,
        first_token_timeout_s=settings.first_token_timeout_s,
    )

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(gateway))
        yield
        sweeper.cancel()
        await gateway.drain()
        store.close()

    app = FastAPI(title="Bespoke", docs_url=None, redoc_url=None, lifespan=lifespan)
    limits = settings.limits
    app.state.context = Context(
        gateway=gateway,
        tenants=Tenants(store, server_secret(settings.home)),
        catalogue=catalogue,
        engines=engines,
        store=store,
        metrics=metrics,
        limits=Limits(
            messages=limits.messages,
            n=limits.n,
            stop_sequences=limits.stop_sequences,
            completion_tokens=limits.completion_tokens,
        ),
    )
    for resource in (chat, completions, models, operations):
        app.include_router(resource.router)
    errors.install(app)
    app.add_middleware(Edge, metrics=metrics, body_bytes_max=limits.body_bytes)
    return app


def _metrics(settings: Settings) -> Metrics:
    """Adapters, whose names tell who the customers are, are named to the operator only."""
    token = settings.metrics_token.get_secret_value() if settings.metrics_token else None
    private = token is not None or settings.host in LOOPBACK
    return Metrics(adapters_max=settings.metrics_adapters if private else 0, token=token)


async def _sweep(gateway: Gateway) -> None:
    """Void the holds of gateways that died; every gateway may do it, the ledger lets one win."""
    while True:
        with contextlib.suppress(StoreUnavailable):
            if count := await gateway.void_expired():
                log.warning("voided %d holds whose gateway died", count)
        await asyncio.sleep(SWEEP_INTERVAL_S)
