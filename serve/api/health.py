"""Routes for load balancers and Prometheus: /healthz, /readyz, /metrics.

The first two name no tenant. /metrics names adapters, unless anyone on the network may read it.
"""

import asyncio
import hmac
from dataclasses import dataclass

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from serve.api.dependencies import Context, Ctx
from serve.api.schemas import HealthStatus, Readiness, errors
from serve.engine.metrics import render_engines
from serve.engine.protocol import Counters, Engine
from serve.errors import EngineUnavailable, Unauthenticated, Unavailable
from serve.formats.response_format import Json
from serve.maintenance import metrics as steward_metrics
from serve.maintenance.steward import StewardClient, StewardStatus
from serve.observability.metrics import merge, render_aggregate, render_budgets

router = APIRouter()


@router.get("/healthz", response_model=HealthStatus)
async def healthz() -> Json:
    """This process answers. The store and the engines are not checked."""
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
    """The metrics of all gateways, the engines and the steward, whichever gateway answers.

    Raises Unauthenticated if there is a metrics token and the request does not bear it.
    """
    if ctx.metrics.token is not None:
        _require_token(ctx.metrics.token, request.headers.get("authorization", ""))
    gateways, engines, steward = await asyncio.gather(
        _gateways(ctx), _engines(ctx), _steward_status(ctx.steward)
    )
    replicas = {base: len(counters) for base, counters in engines.items()}
    text = gateways.text + render_aggregate(gateways.existing, gateways.answering, replicas)
    text += render_engines([replica for counters in engines.values() for replica in counters])
    if ctx.steward is not None:
        text += steward_metrics.render(steward)
        text += b"" if steward is None else render_budgets(steward.budgets)
    return Response(text, media_type=CONTENT_TYPE_LATEST)


@dataclass(frozen=True, slots=True)
class _Gateways:
    """Merged metrics of the gateways, and how many there are and answer."""

    text: bytes
    existing: int
    answering: int


async def _gateways(ctx: Context) -> _Gateways:
    """The metrics of all gateways, or of this one alone if it has no peers or cannot reach them."""
    expositions = [] if ctx.peers is None else await ctx.peers.expositions()
    texts = {exposition.gateway: exposition.text for exposition in expositions if exposition is not None}
    if ctx.metrics.gateway not in texts:
        texts[ctx.metrics.gateway] = (await asyncio.to_thread(ctx.metrics.exposition)).text
    wanted = 1 if ctx.peers is None else ctx.peers.wanted
    return _Gateways(merge(texts.values()), max(wanted, len(expositions), len(texts)), len(texts))


async def _engines(ctx: Context) -> dict[str, list[Counters]]:
    """The counters of each base's replicas. A base that is down has none."""

    async def counters(engine: Engine) -> list[Counters]:
        try:
            return await engine.counters()
        except EngineUnavailable:
            return []

    by_engine = await asyncio.gather(*(counters(engine) for engine in ctx.engines.values()))
    return dict(zip(ctx.engines, by_engine, strict=True))


async def _steward_status(steward: StewardClient | None) -> StewardStatus | None:
    try:
        return None if steward is None else await steward.status()
    except Unavailable:
        return None


def _require_token(token: str, authorization: str) -> None:
    kind, _, sent = authorization.partition(" ")
    # ASGI decodes headers as Latin-1. The comparison takes equally long for every guess.
    if kind.lower() != "bearer" or not hmac.compare_digest(sent.strip().encode("latin-1"), token.encode()):
        raise Unauthenticated("Incorrect metrics token provided.")


def _ping(ctx: Context) -> None:
    with ctx.store.read() as connection:
        connection.exec_driver_sql("SELECT 1")
