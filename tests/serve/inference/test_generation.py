"""A generation settles or voids after faults, which a scripted engine injects."""

import asyncio
from collections.abc import Sequence

import pytest

from serve.billing.ledger.holds import HoldRequest, Outcome, Resolution
from serve.engine.protocol import Accepted, Event, Finished
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    Overloaded,
    StoreUnavailable,
)
from serve.formats.errors import status_of
from serve.inference import generation as generation_module
from serve.inference import settlement
from tests.support.billing_fixture import BillingFixture
from tests.support.scripted_app import ACCEPTED, HELLO, Script, ScriptedEngine
from tests.support.scripted_gateway import (
    closings,
    collect,
    events,
    gateway_of,
    inference_request,
    metric,
    play,
)


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
    shop: BillingFixture, script: Script, error: type[BespokeError]
) -> None:
    with pytest.raises(error):
        asyncio.run(play(shop, script))
    assert not shop.ledger.open_holds()
    assert not events(shop.store)
    assert shop.ledger.account("acme").spent_nanos == 0


@pytest.mark.parametrize("death", [EngineFailed(), RuntimeError("a bug"), asyncio.CancelledError()])
def test_a_failure_in_mid_stream_settles_what_was_delivered(
    shop: BillingFixture, death: BaseException
) -> None:
    with pytest.raises(EngineFailed):
        asyncio.run(play(shop, [*HELLO[:2], death]))
    (event,) = events(shop.store)
    assert (event["status"], event["completion_tokens"]) == ("failed", 1)
    assert not shop.ledger.open_holds()


@pytest.mark.parametrize(
    "end",
    [Finished(10, 4, 2, aborted=False, failed=True), Finished(10, 4, 2, aborted=True)],
    ids=["an error of its core", "an abort that nobody asked for"],
)
def test_an_end_that_the_engine_did_not_mean_is_a_failure_and_its_tokens_are_billed(
    shop: BillingFixture, end: Finished
) -> None:
    with pytest.raises(EngineFailed):
        asyncio.run(play(shop, [*HELLO[:2], [end]]))
    (event,) = events(shop.store)
    assert (event["status"], event["completion_tokens"]) == ("failed", 2)


def test_a_client_that_leaves_aborts_the_engine_and_pays_the_engines_last_count(shop: BillingFixture) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 3, aborted=True)]
        gateway = gateway_of(shop, ScriptedEngine([*HELLO[:2], "hang", last]))
        generation = await gateway.generate(shop.principal, inference_request())
        generation.close()
        await gateway.drain()

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["status"], event["completion_tokens"]) == ("disconnected", 3)


@pytest.mark.parametrize("moment", ["while the hold is taken", "while the engine is asked"])
def test_a_client_that_leaves_before_the_engine_accepts_pays_nothing(
    shop: BillingFixture, moment: str
) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(["hang", [ACCEPTED], [Finished(10, 0, 0, aborted=True)]])
        gateway = gateway_of(shop, engine)
        asking = asyncio.create_task(gateway.generate(shop.principal, inference_request()))
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


def test_a_request_that_takes_too_long_is_stopped_and_billed_as_failed(shop: BillingFixture) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 1, aborted=True)]
        engine = ScriptedEngine([*HELLO[:2], "hang", last])
        gateway = gateway_of(shop, engine, request_timeout_s=0.2)
        generation = await gateway.generate(shop.principal, inference_request())
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
    shop: BillingFixture, lost: Script
) -> None:
    """Invariant 2 too: the event names the replica that did the work."""

    async def scenario() -> None:
        second: Script = [[Accepted("r2", "b2", 10)], *HELLO[1:]]
        engine = ScriptedEngine(lost, second)
        gateway = gateway_of(shop, engine)
        assert await collect(await gateway.generate(shop.principal, inference_request())) == "Hello"
        await gateway.drain()
        assert engine.request_ids == ["req_1", "req_1-2"]
        assert metric(gateway, "bespoke_requests_retried_total") == 1

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["request_id"], event["replica"], event["boot"]) == ("req_1", "r2", "b2")
    assert (event["status"], event["prompt_tokens"], event["completion_tokens"]) == ("complete", 10, 2)
    assert closings(shop.store) == ["settle"]
    assert shop.ledger.account("acme").spent_nanos == event["cost_nanos"]


def test_a_request_whose_replica_dies_after_a_token_is_not_retried_and_settled(shop: BillingFixture) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([*HELLO[:2], EngineLost()], HELLO)
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, inference_request())
        with pytest.raises(EngineFailed):
            await collect(generation)
        await gateway.drain()
        assert engine.request_ids == ["req_1"]

    asyncio.run(scenario())
    (event,) = events(shop.store)
    assert (event["status"], event["replica"], event["completion_tokens"]) == ("failed", "r", 1)


def test_a_lost_request_is_not_retried_for_a_client_that_is_gone(shop: BillingFixture) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([[ACCEPTED], "hang", EngineLost()], HELLO)
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, inference_request())
        generation.close()
        await gateway.drain()
        assert engine.request_ids == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


@pytest.mark.parametrize("second", [[EngineLost()], [[ACCEPTED], EngineLost()]])
def test_a_request_that_is_lost_twice_is_voided_and_unavailable(shop: BillingFixture, second: Script) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([EngineLost()], second, HELLO)
        gateway = gateway_of(shop, engine)
        with pytest.raises(EngineLost) as lost:
            await collect(await gateway.generate(shop.principal, inference_request()))
        assert status_of(lost.value)[0] == 503
        await gateway.drain()
        assert engine.request_ids == ["req_1", "req_1-2"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]
    assert not events(shop.store)


@pytest.mark.parametrize("refusal", [EngineUnavailable(), Overloaded()])
def test_a_refused_request_is_not_retried(shop: BillingFixture, refusal: BespokeError) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([refusal], HELLO)
        gateway = gateway_of(shop, engine)
        with pytest.raises(type(refusal)):
            await gateway.generate(shop.principal, inference_request())
        assert engine.request_ids == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


def test_an_abort_names_the_attempt_that_runs(shop: BillingFixture) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, 1, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], EngineLost()], [[ACCEPTED], "hang", last])
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, inference_request())
        async with asyncio.timeout(10):
            await engine.hanging.wait()
        generation.close()
        await gateway.drain()
        assert engine.aborts == ["req_1-2"]

    asyncio.run(scenario())
    assert [event["status"] for event in events(shop.store)] == ["disconnected"]


def test_an_abort_between_two_attempts_waits_until_the_second_is_accepted(shop: BillingFixture) -> None:
    async def scenario() -> None:
        end: list[Event] = [Finished(10, 0, 0, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], EngineLost()], ["hang", [ACCEPTED], end])
        gateway = gateway_of(shop, engine)
        generation = await gateway.generate(shop.principal, inference_request())
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
    shop: BillingFixture, tokens: int, closing: str
) -> None:
    async def scenario() -> None:
        last: list[Event] = [Finished(10, 0, tokens, aborted=True)]
        engine = ScriptedEngine([[ACCEPTED], "hang", last])
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.05)
        generation = await gateway.generate(shop.principal, inference_request())
        with pytest.raises(EngineUnavailable, match="did not begin"):
            await collect(generation)
        await gateway.drain()
        assert engine.aborts == ["req_1"]

    asyncio.run(scenario())
    assert closings(shop.store) == [closing]
    assert [event["status"] for event in events(shop.store)] == (["failed"] if tokens else [])


def test_a_late_first_token_is_given_up_even_if_the_engine_does_not_answer_the_abort(
    shop: BillingFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation_module, "_ABORT_GRACE_S", 0.05)

    async def deaf(request_id: str) -> None:
        pass

    async def scenario() -> None:
        engine = ScriptedEngine([[ACCEPTED], "hang"])
        monkeypatch.setattr(engine, "abort", deaf)
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.05)
        generation = await gateway.generate(shop.principal, inference_request())
        async with asyncio.timeout(10):
            with pytest.raises(EngineUnavailable, match="did not begin"):
                await collect(generation)
        await gateway.drain()

    asyncio.run(scenario())
    assert closings(shop.store) == ["void"]


def test_a_first_token_in_time_lets_the_rest_take_its_time(shop: BillingFixture) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([*HELLO[:2], "hang", HELLO[2]])
        gateway = gateway_of(shop, engine, first_token_timeout_s=0.01)
        generation = await gateway.generate(shop.principal, inference_request())
        late = asyncio.get_running_loop().call_later(0.05, engine.aborted.set)
        assert await collect(generation) == "Hello"
        late.cancel()
        await gateway.drain()
        assert not engine.aborts

    asyncio.run(scenario())
    assert [event["status"] for event in events(shop.store)] == ["complete"]


def test_nobody_waits_for_a_settlement_that_a_bug_prevents(
    shop: BillingFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "_RETRY_S", (0.0,))
    monkeypatch.setattr(settlement, "_RETRY_LATER_S", 0.0)
    apply = shop.ledger.apply

    def broken(entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        if isinstance(entries[0], Resolution):
            raise RuntimeError("a bug")
        return apply(entries)

    async def scenario() -> None:
        gateway = gateway_of(shop, ScriptedEngine(HELLO))
        monkeypatch.setattr(shop.ledger, "apply", broken)
        generation = await gateway.generate(shop.principal, inference_request())
        assert await asyncio.wait_for(collect(generation), 10) == "Hello"
        await gateway.drain()
        assert metric(gateway, "bespoke_requests_in_progress") == 0

    asyncio.run(scenario())
    assert len(shop.ledger.open_holds()) == 1  # the steward's, when its lease has run out


def test_a_settlement_waits_for_the_store_to_come_back(
    shop: BillingFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, refusals = shop.ledger.apply, [StoreUnavailable(), StoreUnavailable()]

    def flaky(entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        if isinstance(entries[0], Resolution) and refusals:
            raise refusals.pop()
        return apply(entries)

    async def scenario() -> str:
        gateway = gateway_of(shop, ScriptedEngine(HELLO))
        monkeypatch.setattr(shop.ledger, "apply", flaky)
        return await collect(await gateway.generate(shop.principal, inference_request()))

    assert asyncio.run(scenario()) == "Hello"
    assert len(events(shop.store)) == 1
