"""The gateway checks a request before it dispatches it, and settles one that succeeds."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.engine.protocol import (
    EMBEDDING_TOKENS_MAX,
    Delta,
    Event,
    Finished,
    Message,
    Pooling,
    Sampling,
    Texts,
)
from serve.errors import ModelNotFound, NotBillable, StoreUnavailable
from serve.inference.gateway import prompt_tokens_max
from serve.inference.request import InferenceRequest
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion, Model
from serve.storage.database import Store
from serve.tenants import Principal
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, TINY
from tests.support.scripted_app import ACCEPTED, HELLO, ScriptedEngine
from tests.support.scripted_gateway import collect, events, gateway_of, inference_request, metric, play


def test_a_finished_request_is_settled_before_the_client_has_its_end(shop: BillingFixture) -> None:
    async def scenario() -> None:
        gateway = gateway_of(shop, ScriptedEngine(HELLO))
        generation = await gateway.generate(shop.principal, inference_request())
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
    ("adapter", "label"),
    [
        (None, "none"),
        (AdapterVersion(1, "acme", "support", "0123456789abcdef"), "acme/support@0123456789abcdef"),
    ],
    ids=["base", "adapter"],
)
def test_a_request_is_counted_under_its_adapters_version(
    shop: BillingFixture, monkeypatch: pytest.MonkeyPatch, adapter: AdapterVersion | None, label: str
) -> None:
    monkeypatch.setattr(AdapterRegistry, "resolve", lambda *_: Model("acme/support", "tiny", adapter))

    async def scenario() -> None:
        gateway = gateway_of(shop, ScriptedEngine(HELLO))
        await collect(await gateway.generate(shop.principal, inference_request()))
        await gateway.drain()
        labels = {"base": "tiny", "adapter": label}
        assert metric(gateway, "bespoke_adapter_requests_total", status="complete", **labels) == 1
        classes = ("prompt", "cached_prompt", "completion")
        counts = [
            metric(gateway, "bespoke_adapter_tokens_total", **labels, **{"class": kind}) for kind in classes
        ]
        assert counts == [6, 4, 2]
        assert metric(gateway, "bespoke_adapter_time_to_first_token_seconds_count", **labels) == 1

    asyncio.run(scenario())


def test_a_store_that_is_away_refuses_the_request_as_unavailable(
    shop: BillingFixture, tmp_path: Path
) -> None:
    away = BillingFixture(
        Store(f"sqlite:///{tmp_path / 'no' / 'ledger.db'}"),
        shop.tenants,
        shop.ledger,
        shop.principal,
        shop.secret,
        shop.price,
    )
    with pytest.raises(StoreUnavailable):
        asyncio.run(play(away, HELLO))


def test_a_tenant_without_a_price_plan_is_not_sold_to(shop: BillingFixture) -> None:
    shop.tenants.create("newcomer", at=NOON)
    key, _ = shop.tenants.create_key("newcomer", at=NOON)
    newcomer = Principal("newcomer", key.id, key.scopes)
    gateway = gateway_of(shop, ScriptedEngine(HELLO))
    with pytest.raises(NotBillable):
        asyncio.run(gateway.generate(newcomer, inference_request()))


def test_an_unknown_model_is_refused_before_anything_is_held(shop: BillingFixture) -> None:
    gateway = gateway_of(shop, ScriptedEngine(HELLO))
    with pytest.raises(ModelNotFound):
        asyncio.run(gateway.generate(shop.principal, inference_request("acme/nothing")))
    assert not shop.ledger.open_holds()


@pytest.mark.parametrize("text", ["", "Hello", "æøå 漢字 🎉", "a b c " * 50])
def test_the_bound_on_prompt_tokens_is_never_below_the_tokenizers_count(home: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "bases" / TINY)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
    hello = inference_request()
    assert len(chat["input_ids"]) <= prompt_tokens_max(
        replace(hello, prompt=(Message("user", text),)), 10_000
    )
    assert len(tokenizer.encode(text)) <= prompt_tokens_max(replace(hello, prompt=Texts((text,))), 10_000)


def test_nothing_per_token_touches_the_store(shop: BillingFixture) -> None:
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


@pytest.mark.parametrize(
    ("texts", "pooling", "tokens"),
    [
        (("abcd",), Pooling(), 6),  # a byte is a token at most, and two stand around a text
        (("é",), Pooling(), 4),
        (((1, 2, 3),), Pooling(), 3),
        (("a" * 1000, "b"), Pooling(), 256 + 3),
        (("a" * 1000, "b"), Pooling(truncate_tokens=8), 8 + 3),
        (("a" * 1000,), Pooling(truncate_tokens=-1), 256),
        (("a" * 1000,) * 2048, Pooling(), EMBEDDING_TOKENS_MAX),
    ],
)
def test_texts_to_embed_are_held_by_their_bytes_up_to_the_bounds(
    texts: tuple[Any, ...], pooling: Pooling, tokens: int
) -> None:
    sampling = Sampling(completion_tokens_max=0)
    request = InferenceRequest("r", "m", Texts(texts), sampling, "input", pooling=pooling)
    assert prompt_tokens_max(request, 256) == tokens
