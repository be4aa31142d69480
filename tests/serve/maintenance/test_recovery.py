"""Tests that holds of dead gateways are resolved once, by the highest known count."""

import asyncio
import os
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import pytest
import sqlalchemy as sa

from serve.billing.ledger.accounts import transfers_table
from serve.billing.ledger.checkpoints import UsageCheckpoints, checkpoint_files
from serve.billing.ledger.holds import Hold
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import UsageStatus, attempts_table, usage_table
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.errors import EngineUnavailable
from serve.maintenance.recovery import ENGINE_PATIENCE, OWNER_PATIENCE, Recovery
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, RATES

LEASE = timedelta(minutes=10)
ONE = "req_1"


class RememberingEngine:
    """Reports its usage of requests by the names that the gateway gave them."""

    def __init__(self) -> None:
        self.done: dict[str, RequestUsage] = {}
        self.ended: list[str] = []
        self.away = False
        self.embedding_size: int | None = None

    async def final_usage(self, request_id: str) -> list[RequestUsage]:
        if self.away:
            raise EngineUnavailable()
        self.ended.append(request_id)
        return [self.done[request_id]] if request_id in self.done else []


class Scene:
    def __init__(self, shop: BillingFixture, directory: Path) -> None:
        self.shop = shop
        self.directory = directory
        self.engine = RememberingEngine()
        self.now = NOON
        self.released: list[str] = []
        self.commit_queue = CommitQueue(shop.ledger)
        self.recovery = Recovery(
            shop.ledger,
            self.commit_queue,
            {"tiny": self.engine},  # type: ignore[dict-item]
            directory,
            lambda request_id, _: self.released.append(request_id),
            now=lambda: self.now,
        )

    def gateway(self) -> UsageCheckpoints:
        return UsageCheckpoints(self.directory)

    def hold(
        self, owner: str, request_id: str = ONE, *, again: bool = False, at: datetime = NOON
    ) -> BillingTerms:
        terms = BillingTerms(
            "acme",
            self.shop.principal.key_id,
            None,
            "tiny",
            "tiny",
            None,
            self.shop.price.id,
            RATES,
            1,
            "default",
            again,
        )
        hold = Hold(request_id, "acme", 100_000, terms=terms.to_json(), owner=owner)
        self.shop.ledger.hold(hold, at=at, lease=LEASE)
        return terms

    def run(self) -> None:
        asyncio.run(self.recovery.run())

    def events(self) -> list[tuple[str, int, int, int]]:
        c = usage_table.c
        query = sa.select(c.status, c.prompt_tokens, c.cached_tokens, c.completion_tokens).order_by(c.id)
        with self.shop.store.read() as connection:
            return [tuple(row) for row in connection.execute(query)]

    def closings(self) -> list[str]:
        c = transfers_table.c
        query = sa.select(c.kind).where(c.kind.in_(("settle", "void"))).order_by(c.id)
        with self.shop.store.read() as connection:
            return list(connection.execute(query).scalars())


@pytest.fixture
def scene(shop: BillingFixture, tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(shop, tmp_path / "checkpoints")
    yield scene
    scene.commit_queue.stop()


def die(checkpoints: UsageCheckpoints) -> None:
    """Simulate the process's death: its thread and lock are gone, and nothing is cleaned up."""
    checkpoints._stopped.set()
    checkpoints._flusher.join()
    os.close(checkpoints._file)


def served(completion: int, *, cached: int = 0) -> RequestUsage:
    return RequestUsage("r", "b", Tokens(10, cached, completion))


def test_a_living_gateways_requests_are_its_own(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 3))
    scene.run()
    scene.now += LEASE + timedelta(seconds=1)  # its clock may be wrong, or ours
    scene.run()
    assert not scene.closings()
    assert not scene.engine.ended
    scene.now += OWNER_PATIENCE
    scene.run()
    assert scene.closings() == ["void"]
    checkpoints.close()


def test_a_dead_gateways_request_is_billed_by_the_engines_count(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 3))
    checkpoints.flush()
    die(checkpoints)
    scene.engine.done[ONE] = RequestUsage("r", "b", Tokens(10, 4, 7))
    scene.run()
    assert scene.events() == [("incomplete", 10, 4, 7)]
    assert UsageQueries(scene.shop.store).by_engine()["r", "b"].completion_tokens == 7
    assert ONE in scene.engine.ended
    scene.run()
    assert scene.closings() == ["settle"]


def test_a_hold_that_the_store_commits_after_its_gateways_death_is_closed_too(scene: Scene) -> None:
    checkpoints = scene.gateway()
    die(checkpoints)
    scene.run()
    scene.hold(checkpoints.name)
    scene.run()
    assert scene.closings() == ["void"]
    (path,) = checkpoint_files(scene.directory)
    os.utime(path, (0, 0))
    scene.run()
    assert not checkpoint_files(scene.directory)


def test_without_its_engine_it_is_billed_by_the_last_checkpoint(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 3))
    checkpoints.flush()
    checkpoints.track(ONE, partial(served, 4))
    checkpoints.flush()
    die(checkpoints)
    scene.run()
    assert scene.events() == [("incomplete", 10, 0, 4)]


def test_vectors_that_no_client_got_are_not_billed_and_are_accounted_for(scene: Scene) -> None:
    """vLLM has counted 7 of the 10 tokens when the gateway dies: they are ours, and the drift stays zero."""
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 0))
    checkpoints.flush()
    die(checkpoints)
    scene.engine.embedding_size = 384
    scene.engine.done[ONE] = RequestUsage("r", "b", Tokens(7, 0, 0))
    scene.run()
    assert (scene.closings(), scene.events()) == (["void"], [])
    total = UsageQueries(scene.shop.store).by_engine()["r", "b"]
    assert (total.prompt_tokens, total.completion_tokens) == (7, 0)


def test_an_engine_that_does_not_answer_is_waited_for_a_while(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 3))
    checkpoints.flush()
    die(checkpoints)
    scene.engine.away = True
    scene.run()
    assert not scene.closings()
    assert checkpoint_files(scene.directory)
    scene.now += ENGINE_PATIENCE + timedelta(seconds=1)
    scene.run()
    assert scene.events() == [("incomplete", 10, 0, 3)]


def test_what_the_gateway_was_about_to_settle_is_settled_so(scene: Scene) -> None:
    checkpoints = scene.gateway()
    terms = scene.hold(checkpoints.name)
    event = terms.event(ONE, served(5), UsageStatus.COMPLETE, "stop", ttft_ms=7, latency_ms=9, at=NOON)
    checkpoints.note_end(event)
    die(checkpoints)
    scene.now += timedelta(minutes=1)
    scene.run()
    with scene.shop.store.read() as connection:
        row = connection.execute(sa.select(usage_table)).one()
    assert (row.status, row.finish_reason, row.ttft_ms, row.latency_ms) == ("complete", "stop", 7, 9)
    assert (row.completion_tokens, row.cost_nanos, row.created_at) == (5, event.cost_nanos, NOON)


def test_a_request_that_was_not_dispatched_yet_costs_nothing(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    die(checkpoints)
    scene.run()
    assert (scene.closings(), scene.events()) == (["void"], [])
    assert scene.shop.ledger.account("acme").available_nanos == 1_000_000_000


def test_the_second_attempt_is_billed_and_the_first_recorded(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    die(checkpoints)
    scene.engine.done = {
        ONE: RequestUsage("r1", "b1", Tokens(10, 0, 1)),
        f"{ONE}-2": RequestUsage("r2", "b2", Tokens(10, 0, 6)),
    }
    scene.run()
    assert scene.events() == [("incomplete", 10, 0, 6)]
    with scene.shop.store.read() as connection:
        (failed,) = connection.execute(sa.select(attempts_table)).all()
    assert (failed.attempt, failed.replica, failed.completion_tokens) == (1, "r1", 1)
    totals = UsageQueries(scene.shop.store).by_engine()
    assert (totals["r1", "b1"].completion_tokens, totals["r2", "b2"].completion_tokens) == (1, 6)


def test_an_answer_that_somebody_asks_for_again_is_billed_when_it_arrives(scene: Scene) -> None:
    """Its tokens are recorded, so that the ledger still agrees with the engine, but are not billed."""
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name, again=True)
    checkpoints.track(ONE, partial(served, 3))
    checkpoints.flush()
    die(checkpoints)
    scene.engine.done[ONE] = RequestUsage("r", "b", Tokens(10, 0, 8))
    scene.run()
    assert (scene.closings(), scene.events()) == (["void"], [])
    assert scene.released == [ONE]
    assert UsageQueries(scene.shop.store).by_engine()["r", "b"].completion_tokens == 8


def test_an_expired_hold_of_a_gateway_elsewhere_is_closed(scene: Scene) -> None:
    scene.hold("another machine's")
    scene.engine.done[ONE] = RequestUsage("r", "b", Tokens(10, 0, 2))
    scene.run()
    assert not scene.closings()
    scene.now += LEASE + timedelta(seconds=1)
    scene.run()
    assert scene.events() == [("incomplete", 10, 0, 2)]


def test_two_stewards_close_a_request_once(scene: Scene, shop: BillingFixture) -> None:
    checkpoints = scene.gateway()
    for number in range(40):
        scene.hold(checkpoints.name, f"req_{number}")
        checkpoints.track(f"req_{number}", partial(served, number + 1))
    checkpoints.flush()
    die(checkpoints)
    other = Scene(shop, scene.directory)

    async def both() -> None:
        await asyncio.gather(scene.recovery.run(), other.recovery.run())

    asyncio.run(both())
    scene.run()
    other.commit_queue.stop()
    assert scene.closings() == ["settle"] * 40
    assert sum(row[3] for row in scene.events()) == 40 * 41 // 2


def test_a_clock_that_steps_back_closes_nothing_twice_and_leaks_nothing(scene: Scene) -> None:
    checkpoints = scene.gateway()
    scene.hold(checkpoints.name)
    checkpoints.track(ONE, partial(served, 3))
    checkpoints.flush()
    die(checkpoints)
    scene.now = NOON - timedelta(days=1)
    scene.run()
    scene.now = NOON - timedelta(days=2)
    scene.run()
    assert scene.closings() == ["settle"]
    with scene.shop.store.read() as connection:
        assert connection.execute(sa.select(usage_table.c.latency_ms)).scalar_one() == 0


def test_a_sale_is_kept_as_it_was(scene: Scene) -> None:
    terms = scene.hold("somebody", again=True)
    dear = replace(terms, rates=RATES.model_copy(update={"cold_load_nanos": 5}))
    assert BillingTerms.from_json(dear.to_json()) == dear
