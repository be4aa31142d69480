"""A request that may have killed its replica is not passed on, by whichever gateway and tenant."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest

from serve.engine.protocol import JsonFormat, TextFormat, Tool, Toolbox
from serve.errors import EngineFailed, EngineLost, RequestQuarantined
from serve.formats.errors import anthropic_body_of, body_of, status_of
from serve.inference.gateway import Gateway
from serve.inference.quarantine import ENTRIES_MAX, TERM, Quarantine
from serve.inference.request import InferenceRequest
from serve.registry.versions import Model
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.scripted_app import ACCEPTED, HELLO, ScriptedEngine
from tests.support.scripted_gateway import closings, collect, gateway_of, inference_request, metric

PLAIN = inference_request()
GRAMMAR = replace(PLAIN, sampling=replace(PLAIN.sampling, format=JsonFormat()))
PATTERN = replace(PLAIN, sampling=replace(PLAIN.sampling, text_format=TextFormat(regex="a+", param="regex")))
TOOLS = replace(PLAIN, toolbox=Toolbox((Tool("look"),)))
TINY = Model("tiny", "tiny", None)


async def ask(shop: BillingFixture, gateway: Gateway, request: InferenceRequest, request_id: str) -> str:
    try:
        return await collect(await gateway.generate(shop.principal, replace(request, request_id=request_id)))
    finally:
        await gateway.drain()


@pytest.mark.parametrize("request_", [GRAMMAR, PATTERN, TOOLS], ids=["grammar", "pattern", "tools"])
@pytest.mark.parametrize("script", [[EngineLost()], [[ACCEPTED], EngineLost()]])
def test_a_request_with_a_grammar_or_tools_is_not_sent_again_and_then_refused(
    shop: BillingFixture, request_: InferenceRequest, script: list[object]
) -> None:
    async def scenario() -> None:
        first, second = ScriptedEngine(script, HELLO), ScriptedEngine(HELLO)
        gateway, other_gateway = gateway_of(shop, first), gateway_of(shop, second)
        assert await ask(shop, other_gateway, PLAIN, "req_0") == "Hello"  # its cache is warm
        with pytest.raises(EngineLost):
            await ask(shop, gateway, request_, "req_1")
        assert first.request_ids == ["req_1"]
        for each, request_id in ((gateway, "req_2"), (other_gateway, "req_3")):
            with pytest.raises(RequestQuarantined):
                await ask(shop, each, request_, request_id)
            assert metric(each, "bespoke_quarantine_refusals_total") == 1
        assert metric(gateway, "bespoke_requests_quarantined_total") == 1
        assert await ask(shop, gateway, PLAIN, "req_4") == "Hello"

    asyncio.run(scenario())
    assert sorted(closings(shop.store)) == ["settle", "settle", "void"]
    assert not shop.ledger.open_holds()


def test_a_plain_request_is_refused_after_two_deaths(shop: BillingFixture) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine([EngineLost()], [EngineLost()], HELLO)
        gateway = gateway_of(shop, engine)
        with pytest.raises(EngineLost):
            await ask(shop, gateway, PLAIN, "req_1")
        assert engine.request_ids == ["req_1", "req_1-2"]
        with pytest.raises(RequestQuarantined):
            await ask(shop, gateway, PLAIN, "req_2")

    asyncio.run(scenario())


def test_a_request_whose_second_replica_lives_has_no_death_left(shop: BillingFixture) -> None:
    async def scenario() -> None:
        for number in range(3):
            gateway = gateway_of(shop, ScriptedEngine([EngineLost()], HELLO))
            assert await ask(shop, gateway, PLAIN, f"req_{number}") == "Hello"

    asyncio.run(scenario())


def test_two_deaths_in_mid_stream_count_too(shop: BillingFixture) -> None:
    async def scenario() -> None:
        for number, boot in enumerate(("one", "two")):
            accepted = msgspec.structs.replace(ACCEPTED, boot=boot)
            gateway = gateway_of(shop, ScriptedEngine([[accepted], *HELLO[1:2], EngineLost()]))
            with pytest.raises(EngineFailed):
                await ask(shop, gateway, PLAIN, f"req_{number}")
        with pytest.raises(RequestQuarantined):
            await ask(shop, gateway, PLAIN, "req_2")

    asyncio.run(scenario())


def test_one_death_counts_once_however_many_had_sent_the_same(shop: BillingFixture) -> None:
    quarantine = Quarantine(shop.store, b"secret")
    assert not any(quarantine.record_death(PLAIN, TINY, NOON, "one") for _ in range(5))
    assert quarantine.record_death(PLAIN, TINY, NOON, "two")


def test_the_term_ends(shop: BillingFixture) -> None:
    quarantine = Quarantine(shop.store, b"secret")
    assert quarantine.record_death(TOOLS, TINY, NOON)
    with shop.store.read() as connection:
        quarantine.load(connection, NOON)
    with pytest.raises(RequestQuarantined):
        quarantine.check(TOOLS, TINY, NOON + TERM - timedelta(seconds=1))
    quarantine.check(TOOLS, TINY, NOON + TERM)


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda request: replace(request, request_id="req_9", collect=True, tier="batch"), True),
        (lambda request: replace(request, completion_tokens_asked=9, base64=True), True),
        (lambda request: replace(request, toolbox=None), False),
        (lambda request: replace(request, prompt=(replace(request.prompt[0], content="Hi"),)), False),
    ],
)
def test_the_content_decides(
    shop: BillingFixture, change: Callable[[InferenceRequest], InferenceRequest], same: bool
) -> None:
    quarantine = Quarantine(shop.store, b"secret")
    assert (quarantine.digest(TOOLS, TINY) == quarantine.digest(change(TOOLS), TINY)) is same
    assert quarantine.digest(TOOLS, TINY) != Quarantine(shop.store, b"other").digest(TOOLS, TINY)


def test_the_table_is_bounded(shop: BillingFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ENTRIES_MAX <= 10_000
    monkeypatch.setattr("serve.inference.quarantine.ENTRIES_MAX", 3)
    quarantine = Quarantine(shop.store, b"secret")
    requests = [replace(TOOLS, reasoning_effort=str(number)) for number in range(5)]
    for number, request in enumerate(requests):
        quarantine.record_death(request, TINY, NOON + timedelta(seconds=number))
    with shop.store.read() as connection:
        quarantine.load(connection, NOON + timedelta(seconds=5))
    quarantine.check(requests[0], TINY, NOON + timedelta(seconds=5))
    with pytest.raises(RequestQuarantined):
        quarantine.check(requests[4], TINY, NOON + timedelta(seconds=5))


def test_each_dialect_says_that_it_is_quarantined() -> None:
    error = RequestQuarantined()
    assert status_of(error)[0] == 422
    assert body_of(error)["error"]["code"] == "request_quarantined"
    assert anthropic_body_of(error)["error"]["type"] == "invalid_request_error"
