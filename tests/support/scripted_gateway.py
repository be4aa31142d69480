"""Runs a gateway without HTTP over a scripted engine, and reads its ledger afterwards."""

from dataclasses import replace

import sqlalchemy as sa

from serve.billing.ledger.accounts import FINAL_PHASE, transfers_table
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import usage_table
from serve.engine.protocol import Message, Sampling
from serve.inference.gateway import Gateway
from serve.inference.generation import Generation
from serve.inference.request import InferenceRequest
from serve.observability.metrics import Metrics
from serve.rate_limits import RateLimiter
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.scripted_app import Script, ScriptedEngine


def gateway_of(shop: BillingFixture, engine: ScriptedEngine, **settings: float) -> Gateway:
    return Gateway(
        store=shop.store,
        registry=AdapterRegistry(shop.store, ["tiny"]),
        engines={"tiny": engine},
        rate_limiter=RateLimiter(shop.store, "test"),
        commit_queue=CommitQueue(shop.ledger),
        checkpoints=None,
        metrics=Metrics(adapters_max=1),
        request_timeout_s=settings.get("request_timeout_s", 60),
        first_token_timeout_s=settings.get("first_token_timeout_s", 60),
        now=lambda: NOON,
    )


def inference_request(model: str = "tiny") -> InferenceRequest:
    hello = (Message("user", "Hello"),)
    return InferenceRequest("req_1", model, hello, Sampling(completion_tokens_max=5))


async def collect(generation: Generation) -> str:
    return "".join([delta.text async for batch in generation for delta in batch])


def events(store: Store) -> list[dict[str, object]]:
    with store.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(usage_table)).mappings()]


def closings(store: Store) -> list[str]:
    c = transfers_table.c
    closing = sa.select(c.kind).where(c.phase == FINAL_PHASE, c.kind != "grant")
    with store.read() as connection:
        return list(connection.execute(closing).scalars())


def metric(gateway: Gateway, name: str, **labels: str) -> float | None:
    return gateway.context.metrics.registry.get_sample_value(name, labels)


async def play(shop: BillingFixture, script: Script, request_id: str = "req_1") -> str:
    gateway = gateway_of(shop, ScriptedEngine(script))
    try:
        request = replace(inference_request(), request_id=request_id)
        return await collect(await gateway.generate(shop.principal, request))
    finally:
        await gateway.drain()
