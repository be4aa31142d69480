"""/healthz, /readyz, /metrics: for load balancers and Prometheus. They name no tenant."""

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from serve.api.answers import Json
from serve.api.context import Context, Ctx
from serve.engine.base import Counters
from serve.errors import EngineUnavailable
from serve.metrics import render

router = APIRouter()


@router.get("/healthz")
async def healthz() -> Json:
    """This process answers. Says nothing about what is behind it."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(ctx: Ctx) -> Json:
    """The store answers and every base has a live engine; else 503 with Retry-After."""
    await asyncio.to_thread(_ping, ctx)
    await asyncio.gather(*(engine.counters() for engine in ctx.engines.values()))
    return {"status": "ready", "bases": sorted(ctx.engines)}


@router.get("/metrics")
async def metrics(ctx: Ctx) -> Response:
    counters: list[Counters] = []
    for engine in ctx.engines.values():
        try:
            counters += await engine.counters()
        except EngineUnavailable:
            continue  # an engine that is down has no counters; the gateway's own still count
    return Response(render(ctx.metrics, counters), media_type=CONTENT_TYPE_LATEST)


def _ping(ctx: Context) -> None:
    with ctx.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
