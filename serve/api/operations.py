"""/healthz, /readyz, /metrics: for load balancers and Prometheus.

The first two name no tenant. /metrics names adapters, unless anyone on the network may read it.
"""

import asyncio
import hmac

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from serve import steward_metrics
from serve.api.connection import Json
from serve.api.context import Context, Ctx
from serve.api.document import errors
from serve.api.objects import Readiness, Status
from serve.engine.base import Counters
from serve.errors import EngineUnavailable, Unauthenticated, Unavailable
from serve.metrics import render, render_budgets
from serve.steward import Measurements, Watched

router = APIRouter()


@router.get("/healthz", response_model=Status)
async def healthz() -> Json:
    """This process answers. Says nothing about what is behind it."""
    return {"status": "ok"}


@router.get("/readyz", response_model=Readiness, responses=errors(500, 503))
async def readyz(ctx: Ctx) -> Json:
    """The store answers and every base has a live engine; else 503 with Retry-After."""
    await asyncio.to_thread(_ping, ctx)
    await asyncio.gather(*(engine.counters() for engine in ctx.engines.values()))
    return {"status": "ready", "bases": sorted(ctx.engines)}


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=errors(401, 500),
)
async def metrics(request: Request, ctx: Ctx) -> Response:
    """Raises Unauthenticated if there is a metrics token and the request does not bear it."""
    if ctx.metrics.token is not None:
        _require(ctx.metrics.token, request.headers.get("authorization", ""))
    counters: list[Counters] = []
    for engine in ctx.engines.values():
        try:
            counters += await engine.counters()
        except EngineUnavailable:
            continue  # an engine that is down has no counters; the gateway's own still count
    text = render(ctx.metrics, counters)
    if ctx.steward is not None:
        measured = await _measured(ctx.steward)
        text += steward_metrics.render(measured)
        text += b"" if measured is None else render_budgets(measured.budgets)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


async def _measured(steward: Watched) -> Measurements | None:
    try:
        return await steward.measurements()
    except Unavailable:
        return None


def _require(token: str, authorization: str) -> None:
    kind, _, given = authorization.partition(" ")
    # ASGI decodes headers as Latin-1; the comparison takes as long for any guess.
    if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()):
        raise Unauthenticated("Incorrect metrics token provided.")


def _ping(ctx: Context) -> None:
    with ctx.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
