"""Tests that the steward's jobs are independent, and that /metrics shows its status."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from serve.billing.ledger.holds import Hold
from serve.engine.protocol import Counters
from serve.errors import EngineUnavailable, StoreUnavailable
from serve.maintenance import metrics as steward_metrics
from serve.maintenance.steward import Steward, StewardStatus
from tests.serve.billing.ledger.test_ledger import event
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON

LEASE = timedelta(minutes=10)


class CountingEngine:
    """Simulates an engine process with the counters that a test sets."""

    def __init__(self, prompt: int = 0, completion: int = 0) -> None:
        self.counted = (prompt, completion)
        self.away = False

    async def counters(self) -> list[Counters]:
        if self.away:
            raise EngineUnavailable()
        # One prompt token and one completion token are its own start-up check.
        return [Counters("tiny", "r", "b", self.counted[0] + 1, self.counted[1] + 1, 1, 1, 0)]


def steward_of(
    shop: BillingFixture,
    tmp_path: Path,
    engine: CountingEngine,
    jobs: dict[str, tuple[float, Callable[[datetime], object]]] | None = None,
) -> Steward:
    engines = {"tiny": engine}
    return Steward(
        shop.store,
        engines,  # type: ignore[arg-type]
        tmp_path / "checkpoints",
        lambda _request_id, _connection: None,
        lease=LEASE,
        jobs=jobs,
        now=lambda: NOON + timedelta(seconds=5),
    )


def watch(steward: Steward, seen: Callable[[StewardStatus], bool]) -> StewardStatus:
    """Return the first status for which `seen` is true."""

    async def scenario() -> StewardStatus:
        running = asyncio.create_task(steward.run())
        try:
            async with asyncio.timeout(30):
                while not seen(measured := await steward.status()):
                    await asyncio.sleep(0.01)
                return measured
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    return asyncio.run(scenario())


def sell(shop: BillingFixture, request_id: str) -> None:
    hold = Hold(request_id, "acme", 1000)
    shop.ledger.hold(hold, at=NOON, lease=LEASE)
    shop.ledger.settle(hold, event(shop, request_id), at=NOON)


def test_the_drift_is_what_an_engine_counted_and_nobody_was_billed_for(
    shop: BillingFixture, tmp_path: Path
) -> None:
    sell(shop, "r1")  # 10 prompt tokens, 5 completion tokens
    agreeing = watch(steward_of(shop, tmp_path, CountingEngine(10, 5)), lambda m: m.drift_at is not None)
    assert [(one.prompt_drift, one.completion_drift) for one in agreeing.drift] == [(0, 0)]
    drifting = watch(steward_of(shop, tmp_path, CountingEngine(10, 8)), lambda m: m.drift_at is not None)
    assert [(one.prompt_drift, one.completion_drift) for one in drifting.drift] == [(0, 3)]
    families = text_string_to_metric_families(steward_metrics.render(drifting).decode())
    samples = {
        (sample.name, sample.labels.get("class")): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples["bespoke_ledger_drift_tokens", "completion"] == 3
    assert samples["bespoke_steward_up", None] == 1


def test_while_a_request_is_under_way_nothing_is_compared(shop: BillingFixture, tmp_path: Path) -> None:
    shop.ledger.hold(Hold("r1", "acme", 1000), at=NOON, lease=LEASE)
    measured = watch(steward_of(shop, tmp_path, CountingEngine(10, 8)), lambda m: "reconcile" in m.jobs)
    assert (measured.drift, measured.open_holds, measured.oldest_hold_s) == ((), 1, 5.0)


def test_an_engine_that_is_down_is_compared_with_nothing(shop: BillingFixture, tmp_path: Path) -> None:
    engine = CountingEngine()
    engine.away = True
    assert watch(steward_of(shop, tmp_path, engine), lambda m: m.drift_at is not None).drift == ()


def test_a_job_that_fails_is_tried_again_and_holds_up_no_other(shop: BillingFixture, tmp_path: Path) -> None:
    tried: list[str] = []

    def failing(_at: datetime) -> None:
        tried.append("failing")
        raise ZeroDivisionError if len(tried) % 2 else StoreUnavailable()

    def working(at: datetime) -> None:
        assert at == NOON + timedelta(seconds=5)

    jobs = {"failing": (0.01, failing), "working": (0.01, working)}
    measured = watch(
        steward_of(shop, tmp_path, CountingEngine(), jobs),
        lambda m: len(tried) > 2 and "working" in m.jobs,
    )
    assert "failing" not in measured.jobs


def test_without_a_steward_metrics_say_that_it_is_down() -> None:
    assert b"bespoke_steward_up 0.0" in steward_metrics.render(None)
