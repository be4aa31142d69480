"""Faults that a real engine cannot be asked for: a scripted engine injects them behind the seam."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve import generation as generation_module
from serve.adapters import AdapterRef, Model
from serve.admission import Admission
from serve.api.errors import status_of
from serve.billing.accounts import CLOSING, transfers_table
from serve.billing.books import Books
from serve.billing.ledger import Closing, Opening, Outcome
from serve.billing.usage import usage_table
from serve.call import Call
from serve.catalogue import Catalogue
from serve.db import Store
from serve.engine.base import (
    Accepted,
    Counters,
    Delta,
    Event,
    Final,
    Finished,
    GenerationRequest,
    Message,
    Sampling,
    Take,
    Texts,
)
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    ModelNotFound,
    NotBillable,
    Overloaded,
    StoreUnavailable,
)
from serve.gateway import Gateway, prompt_tokens_max
from serve.generation import Generation
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


Script = Sequence[list[Event] | BaseException | str]


class ScriptedEngine:
    """Plays events, one script per attempt; an exception in it is raised, "hang" waits for the abort."""

    context_tokens_max = 100

    def __init__(self, *scripts: Script) -> None:
        self._scripts = iter(scripts)
        self.asked: list[str] = []
        self.aborts: list[str] = []
        self.hanging = asyncio.Event()
        self.aborted = asyncio.Event()

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        async for batch in self._play(request):
            take(batch)

    async def _play(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        self.asked.append(request.request_id)
        for item in next(self._scripts):
            if isinstance(item, BaseException):
                raise item
            if item == "hang":
                self.hanging.set()
                await self.aborted.wait()
            else:
                assert not isinstance(item, str)
                yield item

    async def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        self.aborted.set()

    async def finals(self, request_id: str) -> list[Final]:
        return []

    async def counters(self) -> list[Counters]:
        return []


def gateway_of(shop: Shop, engine: ScriptedEngine, **settings: float) -> Gateway:
    return Gateway(
        store=shop.store,
        catalogue=Catalogue(shop.store, ["tiny"]),
        engines={"tiny": engine},
        admission=Admission(shop.store, "test"),
        books=Books(shop.ledger),
        journal=None,
        metrics=Metrics(adapters_max=1),
        request_timeout_s=settings.get("request_timeout_s", 60),
        first_token_timeout_s=settings.get("first_token_timeout_s", 60),
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
    c = transfers_table.c
    closing = sa.select(c.kind).where(c.phase == CLOSING, c.kind != "grant")
    with store.read() as connection:
        return list(connection.execute(closing).scalars())


def metric(gateway: Gateway, name: str, **labels: str) -> float | None:
    return gateway.terms.metrics.registry.get_sample_value(name, labels)


async def play(shop: Shop, script: Script, request_id: str = "req_1") -> str:
    gateway = gateway_of(shop, ScriptedEngine(script))
    try:
        asked = replace(call(), request_id=request_id)
        return await collect(await gateway.generate(shop.principal, asked))
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
    shop: Shop, script: Script, error: type[BespokeError]
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


@pytest.mark.parametrize(
    "lost", [[EngineLost()], [[ACCEPTED], EngineLost()]], ids=["before accepted", "after accepted"]
)
def test_a_request_whose_replica_dies_before_the_first_token_is_retried_and_billed_once(
    shop: Shop, lost: Script
) -> None:
    """Invariant 2 too: the event names the replica that did the work."""

    async def scenario() -> None:
        second: Script = [[Accepted("r2", "b2", 10)], *ANSWER[1:]]
        engine = ScriptedEngine(lost, second)
        gateway = gateway_of(shop, engine)
        assert await collect(await gateway.generate(shop.principal, call())) == "Hello"
        await gateway.drain()
        assert engine.asked == ["req_1", "req_1-2"]
        assert metric(gateway, "bespoke_requests_retried_total") == 1

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["request_id"], event["replica"], event["boot"]) == ("req_1", "r2", "b2")
    assert (event["status"], event["prompt_tokens"], event["completion_tokens"]) == ("complete", 10, 2)
    assert closings(shop.store) == ["settle"]
    assert shop.ledger.account("acme").spent_nanos == event["cost_nanos"]


def test_a_request_whose_replica_dies_after_a_token_is_not_retried_and_settled(shop: Shop) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([*ANSWER[:2], EngineLost()], ANSWER)
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, call())
        with pytest.raises(EngineFailed):
            await collect(generation)
        await gateway.drain()
        assert engine.asked == ["req_1"]

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["status"], event["replica"], event["completion_tokens"]) == ("failed", "r", 1)


def test_a_lost_request_is_not_retried_for_a_client_that_is_gone(shop: Shop) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([[ACCEPTED], "hang", EngineLost()], ANSWER)
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, call())
        generation.close()
        await gateway.drain()
        assert engine.asked == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


@pytest.mark.parametrize("second", [[EngineLost()], [[ACCEPTED], EngineLost()]])
def test_a_request_that_is_lost_twice_is_voided_and_unavailable(shop: Shop, second: Script) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([EngineLost()], second, ANSWER)
        gateway = gateway_of(shop, engine)
        with pytest.raises(EngineLost) as lost:
            await collect(await gateway.generate(shop.principal, call()))
        assert status_of(lost.value)[0] == 503
        await gateway.drain()
        assert engine.asked == ["req_1", "req_1-2"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]
    assert not events(shop.store)


@pytest.mark.parametrize("refusal", [EngineUnavailable(), Overloaded()])
def test_a_refused_request_is_not_retried(shop: Shop, refusal: BespokeError) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([refusal], ANSWER)
        gateway = gateway_of(shop, engine)
        with pytest.raises(type(refusal)):
            await gateway.generate(shop.principal, call())
        assert engine.asked == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


def test_an_abort_names_the_attempt_that_runs(shop: Shop) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 1, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], EngineLost()], [[ACCEPTED], "hang", last])
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, call())
        async with asyncio.timeout(10):
            await engine.hanging.wait()
        generation.close()
        await gateway.drain()
        assert engine.aborts == ["req_1-2"]

    asyncio.run(scenario())
    assert [event["status"] for event in events(shop.store)] == ["disconnected"]


def test_an_abort_between_two_attempts_waits_until_the_second_is_accepted(shop: Shop) -> None:
    async def scenario() -> None:
        end: list[Event] = [Finished(10, 0, 0, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], EngineLost()], ["hang", [ACCEPTED], end])
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, call())
        async with asyncio.timeout(10):
            await engine.hanging.wait()
        generation.close()
        await asyncio.sleep(0)  # an abort would have begun
        assert not engine.aborts
        engine.aborted.set()  # the engine goes on to accept
        await gateway.drain()

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


@pytest.mark.parametrize(("tokens", "closing"), [(0, "void"), (2, "settle")])
def test_a_first_token_that_is_late_aborts_the_request_and_only_tokens_are_billed(
    shop: Shop, tokens: int, closing: str
) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, tokens, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], "hang", last])
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.05)
        generation = await gateway.generate(shop.principal, call())
        with pytest.raises(EngineUnavailable, match="did not begin"):
            await collect(generation)
        await gateway.drain()
        assert engine.aborts == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == [closing]
    assert [event["status"] for event in events(shop.store)] == (["failed"] if tokens else [])


def test_a_late_first_token_is_given_up_even_if_the_engine_does_not_answer_the_abort(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "_ABORT_GRACE_S", 0.05)

    async def deaf(request_id: str) -> None:
        pass

    async def scenario() -> None:
        engine = ScriptedEngine([[ACCEPTED], "hang"])
        monkeypatch.setattr(engine, "abort", deaf)
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.05)
        generation = await gateway.generate(shop.principal, call())
        async with asyncio.timeout(10):
            with pytest.raises(EngineUnavailable, match="did not begin"):
                await collect(generation)
        await gateway.drain()

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


def test_a_first_token_in_time_lets_the_rest_take_its_time(shop: Shop) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([*ANSWER[:2], "hang", ANSWER[2]])
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.01)
        generation = await gateway.generate(shop.principal, call())
        late = asyncio.get_running_loop().call_later(0.05, engine.aborted.set)
        assert await collect(generation) == "Hello"
        late.cancel()
        await gateway.drain()
        assert not engine.aborts

    asyncio.run(scenario())
    assert [event["status"] for event in events(shop.store)] == ["complete"]


@pytest.mark.parametrize(
    ("adapter", "label"),
    [(None, "none"), (AdapterRef(1, "acme", "support", "0123456789abcdef"), "acme/support@0123456789abcdef")],
    ids=["base", "adapter"],
)
def test_a_request_is_counted_under_its_adapters_version(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, adapter: AdapterRef | None, label: str
) -> None:
    monkeypatch.setattr(Catalogue, "resolve", lambda *_: Model("acme/support", "tiny", adapter))

    async def scenario() -> None:
        gateway = gateway_of(shop, ScriptedEngine(ANSWER))
        await collect(await gateway.generate(shop.principal, call()))
        await gateway.drain()
        who = {"base": "tiny", "adapter": label}
        assert metric(gateway, "bespoke_adapter_requests_total", status="complete", **who) == 1
        classes = ("prompt", "cached_prompt", "completion")
        counts = [
            metric(gateway, "bespoke_adapter_tokens_total", **who, **{"class": kind}) for kind in classes
        ]
        assert counts == [6, 4, 2]
        assert metric(gateway, "bespoke_adapter_time_to_first_token_seconds_count", **who) == 1

    asyncio.run(scenario())


def test_a_settlement_waits_for_the_store_to_come_back(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    apply, refusals = shop.ledger.apply, [StoreUnavailable(), StoreUnavailable()]

    def flaky(entries: Sequence[Opening | Closing]) -> list[Outcome]:
        if isinstance(entries[0], Closing) and refusals:
            raise refusals.pop()
        return apply(entries)

    async def scenario() -> str:
        gateway = gateway_of(shop, ScriptedEngine(ANSWER))
        monkeypatch.setattr(shop.ledger, "apply", flaky)
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
    hello = call()
    assert len(chat["input_ids"]) <= prompt_tokens_max(
        replace(hello, prompt=(Message("user", text),)), 10_000
    )
    assert len(tokenizer.encode(text)) <= prompt_tokens_max(replace(hello, prompt=Texts((text,))), 10_000)


def test_nothing_per_token_touches_the_store(shop: Shop) -> None:
    """Invariant 8: a long answer makes as many transactions as a short one."""
    begun: list[object] = []
    sa.event.listen(shop.store._engine, "begin", begun.append)

    def transactions(tokens: int) -> int:
        deltas: list[list[Event]] = [[Delta(0, "a", 1)] for _ in range(tokens)]
        begun.clear()
        answer = [[ACCEPTED], *deltas, [Delta(0, "", 0, "length"), Finished(10, 0, tokens, aborted=False)]]
        asyncio.run(play(shop, answer, request_id=f"req_{tokens}"))
        return len(begun)

    assert transactions(1) == transactions(300) > 0
