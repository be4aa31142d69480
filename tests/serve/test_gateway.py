"""Faults that a real engine cannot be asked for: a scripted engine injects them behind the seam."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.adapters import Catalogue
from serve.billing.ledger import CLOSING, transfers_table
from serve.billing.usage import usage_table
from serve.db import Store
from serve.engine.base import (
    Accepted,
    Counters,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Message,
    Sampling,
)
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineUnavailable,
    ModelNotFound,
    NotBillable,
    StoreUnavailable,
)
from serve.gateway import Call, Gateway, Generation, prompt_tokens_max
from serve.metrics import Metrics
from serve.tenants import Principal
from tests.serve.conftest import NOON, TINY, Shop

ACCEPTED = Accepted("r", "b", 10)
FINISHED = Finished(10, 4, 2, aborted=False)
ANSWER: list[list[Event]] = [
    [ACCEPTED],
    [Delta(0, "Hel", 1)],
    [Delta(0, "lo", 1, "stop"), FINISHED],
]


class ScriptedEngine:
    """Plays events; an exception in the script is raised, "hang" waits for the abort."""

    context_tokens_max = 100

    def __init__(self, script: Sequence[list[Event] | BaseException | str]) -> None:
        self._script = script
        self.aborted = asyncio.Event()

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        for item in self._script:
            if isinstance(item, BaseException):
                raise item
            if item == "hang":
                await self.aborted.wait()
            else:
                assert not isinstance(item, str)
                yield item

    async def abort(self, request_id: str) -> None:
        self.aborted.set()

    async def counters(self) -> list[Counters]:
        return []


def gateway_of(shop: Shop, engine: ScriptedEngine, **settings: float) -> Gateway:
    return Gateway(
        store=shop.store,
        catalogue=Catalogue(shop.store, ["tiny"]),
        engines={"tiny": engine},
        metrics=Metrics(),
        request_timeout_s=settings.get("request_timeout_s", 60),
        now=lambda: NOON,
    )


def call(model: str = "tiny") -> Call:
    hello = (Message("user", "Hello"),)
    return Call("req_1", model, hello, Sampling(completion_tokens_max=5), "max_tokens")


async def collect(generation: Generation) -> str:
    return "".join([delta.text async for batch in generation for delta in batch])


def events(store: Store) -> list[dict[str, object]]:
    with store.read() as connection:
        return [dict(row) for row in connection.execute(sa.select(usage_table)).mappings()]


def closings(store: Store) -> list[str]:
    closing = sa.select(transfers_table.c.kind).where(transfers_table.c.phase == CLOSING)
    with store.read() as connection:
        return list(connection.execute(closing).scalars())


async def play(shop: Shop, script: Sequence[list[Event] | BaseException | str]) -> str:
    gateway = gateway_of(shop, ScriptedEngine(script))
    try:
        return await collect(await gateway.generate(shop.principal, call()))
    finally:
        await gateway.drain()


def test_a_finished_request_is_settled_before_the_client_has_its_end(shop: Shop) -> None:
    async def scenario() -> None:
        gateway = gateway_of(shop, ScriptedEngine(ANSWER))
        generation = await gateway.generate(shop.principal, call())
        async for batch in generation:
            if any(delta.finish_reason for delta in batch):
                assert len(events(shop.store)) == 1
        await gateway.drain()

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["prompt_tokens"], event["cached_tokens"], event["completion_tokens"]) == (10, 4, 2)
    assert event["cost_nanos"] == 6 * 100 + 4 * 50 + 2 * 400
    assert shop.ledger.account("acme").spent_nanos == event["cost_nanos"]


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ([EngineUnavailable()], EngineUnavailable),
        ([ContextLengthExceeded(100, 99, 5, "messages")], ContextLengthExceeded),
        ([RuntimeError("a bug")], EngineUnavailable),
        ([asyncio.CancelledError()], EngineUnavailable),
        ([[ACCEPTED], EngineFailed()], EngineFailed),
        ([[ACCEPTED]], EngineFailed),
        ([], EngineUnavailable),
    ],
    ids=["down", "too-long", "bug", "cancelled", "died-before-first-token", "ended-early", "silent"],
)
def test_a_failure_before_the_first_token_is_voided(
    shop: Shop, script: Sequence[list[Event] | BaseException | str], error: type[BespokeError]
) -> None:
    with pytest.raises(error):
        asyncio.run(play(shop, script))
    assert not shop.ledger.open_holds()
    assert not events(shop.store)
    assert shop.ledger.account("acme").spent_nanos == 0


@pytest.mark.parametrize("death", [EngineFailed(), RuntimeError("a bug"), asyncio.CancelledError()])
def test_a_failure_in_mid_stream_settles_what_was_delivered(shop: Shop, death: BaseException) -> None:
    with pytest.raises(EngineFailed):
        asyncio.run(play(shop, [*ANSWER[:2], death]))
    (event,) = events(shop.store)
    assert (event["status"], event["completion_tokens"]) == ("failed", 1)
    assert not shop.ledger.open_holds()


def test_a_client_that_leaves_aborts_the_engine_and_pays_the_engines_last_count(shop: Shop) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 3, aborted=True)]
        gateway = gateway_of(shop, ScriptedEngine([*ANSWER[:2], "hang", last]))
        generation = await gateway.generate(shop.principal, call())
        generation.close()
        await gateway.drain()

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["status"], event["completion_tokens"]) == ("disconnected", 3)


@pytest.mark.parametrize("moment", ["while the hold is taken", "while the engine is asked"])
def test_a_client_that_leaves_before_the_engine_accepts_pays_nothing(shop: Shop, moment: str) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(["hang", [ACCEPTED], [Finished(10, 0, 0, aborted=True)]])
        gateway = gateway_of(shop, engine)
        asking = asyncio.create_task(gateway.generate(shop.principal, call()))
        await asyncio.sleep(0)  # it has begun
        while moment == "while the engine is asked" and not shop.ledger.open_holds():
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        engine.aborted.set()
        async with asyncio.timeout(10):
            while not closings(shop.store):
                await asyncio.sleep(0.001)
        await gateway.drain()

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]
    assert not shop.ledger.open_holds()
    assert not events(shop.store)


def test_a_request_that_takes_too_long_is_stopped_and_billed_as_failed(shop: Shop) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 1, aborted=True)]
        engine = ScriptedEngine([*ANSWER[:2], "hang", last])
        gateway = gateway_of(shop, engine, request_timeout_s=0.2)
        generation = await gateway.generate(shop.principal, call())
        with pytest.raises(EngineFailed, match="longer"):
            await collect(generation)
        await gateway.drain()

    asyncio.run(scenario())
    assert [(event["status"], event["finish_reason"]) for event in events(shop.store)] == [
        ("failed", "timeout")
    ]


def test_a_settlement_waits_for_the_store_to_come_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    settle, refusals = shop.ledger.settle, [StoreUnavailable(), StoreUnavailable()]

    def flaky(*args: object, **kwargs: object) -> bool:
        if refusals:
            raise refusals.pop()
        return settle(*args, **kwargs)  # type: ignore[arg-type]

    async def scenario() -> str:
        gateway = gateway_of(shop, ScriptedEngine(ANSWER))
        monkeypatch.setattr(gateway.ledger, "settle", flaky)
        return await collect(await gateway.generate(shop.principal, call()))

    assert asyncio.run(scenario()) == "Hello"
    assert len(events(shop.store)) == 1


def test_a_store_that_is_away_refuses_the_request_as_unavailable(shop: Shop, tmp_path: Path) -> None:
    away = Shop(
        Store(f"sqlite:///{tmp_path / 'no' / 'ledger.db'}"),
        shop.tenants,
        shop.ledger,
        shop.principal,
        shop.secret,
        shop.price,
    )
    with pytest.raises(StoreUnavailable):
        asyncio.run(play(away, ANSWER))


def test_a_tenant_without_a_price_plan_is_not_sold_to(shop: Shop) -> None:
    shop.tenants.create("newcomer", at=NOON)
    key, _ = shop.tenants.create_key("newcomer", at=NOON)
    newcomer = Principal("newcomer", key.id, key.scopes)
    gateway = gateway_of(shop, ScriptedEngine(ANSWER))
    with pytest.raises(NotBillable):
        asyncio.run(gateway.generate(newcomer, call()))


def test_an_unknown_model_is_refused_before_anything_is_held(shop: Shop) -> None:
    gateway = gateway_of(shop, ScriptedEngine(ANSWER))
    with pytest.raises(ModelNotFound):
        asyncio.run(gateway.generate(shop.principal, call("acme/nothing")))
    assert not shop.ledger.open_holds()


@pytest.mark.parametrize("text", ["", "Hello", "æøå 漢字 🎉", "a b c " * 50])
def test_the_bound_on_prompt_tokens_is_never_below_the_tokenizers_count(home: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "bases" / TINY)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    assert len(chat["input_ids"]) <= prompt_tokens_max((Message("user", text),), 10_000)
    assert len(tokenizer.encode(text)) <= prompt_tokens_max(text, 10_000)
