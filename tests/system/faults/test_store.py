"""Faults of the store without an application: deliveries twice, a full disk, a clock that steps back."""

import pickle
import subprocess
import sys
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serve.billing.ledger.holds import Hold, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import UsageEvent
from serve.errors import StoreUnavailable
from serve.maintenance.recovery import ENGINE_PATIENCE
from serve.storage.database import Store
from tests.serve.maintenance.test_recovery import Scene
from tests.support.billing_fixture import BillingFixture, onboard
from tests.support.constants import NOON
from tests.support.disks import small_disk
from tests.support.usage_events import COST_NANOS, usage_event

LEASE = timedelta(minutes=10)


def event(shop: BillingFixture, request_id: str) -> UsageEvent:
    return usage_event(request_id, key_id=shop.principal.key_id, plan_id=shop.price.id)


# Settles all that is open, in an order of its own; says how many it has closed itself.
DELIVER = """
import pickle, random, sys, time
from serve.billing.ledger.ledger import Ledger
from serve.storage.database import Store
url, events, seed = sys.argv[1], pickle.load(open(sys.argv[2], "rb")), int(sys.argv[3])
random.Random(seed).shuffle(events)
ledger = Ledger(Store(url))
print("ready", flush=True)
sys.stdin.readline()
closed = 0
for hold, event in events:
    closed += ledger.settle(hold, event, at=event.created_at)
    time.sleep(0.002)  # so that the other has its turn, too
print(closed, flush=True)
"""


def test_a_settlement_that_two_processes_deliver_at_once_counts_once(
    shop: BillingFixture, tmp_path: Path
) -> None:
    holds = [Hold(f"req_{number}", "acme", 1000) for number in range(100)]
    for hold in holds:
        shop.ledger.hold(hold, at=NOON, lease=LEASE)
    given = tmp_path / "events"
    given.write_bytes(pickle.dumps([(hold, event(shop, hold.request_id)) for hold in holds]))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DELIVER, shop.store.url, str(given), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        closed = [int(process.communicate(timeout=60)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert sum(closed) == len(holds)
    account = shop.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (len(holds) * COST_NANOS, 0)
    assert [check for check in verify(shop.store) if check.mismatches] == []


def test_a_settlement_delivered_twice_in_one_transaction_counts_once(shop: BillingFixture) -> None:
    shop.ledger.hold(Hold("req_1", "acme", 1000), at=NOON, lease=LEASE)
    delivered = Resolution("req_1", "acme", NOON, event=event(shop, "req_1"))
    assert shop.ledger.apply([delivered, delivered]) == [True, False]
    assert shop.ledger.apply([delivered]) == [False]
    assert shop.ledger.account("acme").spent_nanos == COST_NANOS


def test_a_clock_that_steps_back_neither_frees_a_hold_early_nor_leaks_one(shop: BillingFixture) -> None:
    """Leases are of the wall clock; what happens while it is wrong is late at most."""
    earlier = NOON - timedelta(hours=1)
    shop.ledger.hold(Hold("req_before", "acme", 1000), at=NOON, lease=LEASE)
    shop.ledger.hold(Hold("req_after", "acme", 1000), at=earlier, lease=LEASE)
    assert shop.ledger.open_holds(expired_at=earlier) == []
    # The one from after the step expires by the same clock; the other when it has come there again.
    late = [one.hold.request_id for one in shop.ledger.open_holds(expired_at=earlier + LEASE * 2)]
    assert late == ["req_after"]
    assert len(shop.ledger.open_holds(expired_at=NOON + LEASE * 2)) == 2
    assert shop.ledger.settle(Hold("req_before", "acme", 1000), event(shop, "req_before"), at=earlier)
    assert shop.ledger.void(Hold("req_after", "acme", 1000), "late", at=earlier)
    assert not shop.ledger.settle(Hold("req_before", "acme", 1000), event(shop, "req_before"), at=NOON)
    account = shop.ledger.account("acme")
    assert (account.spent_nanos, account.held_nanos) == (COST_NANOS, 0)
    assert [check for check in verify(shop.store) if check.mismatches] == []


def test_a_clock_that_steps_back_does_not_prolong_the_patience_with_an_engine_that_is_away(
    shop: BillingFixture, tmp_path: Path
) -> None:
    scene = Scene(shop, tmp_path / "checkpoints")
    scene.hold("a gateway elsewhere")
    scene.engine.away = True
    scene.now = NOON + LEASE * 2
    scene.run()
    scene.now = NOON + LEASE + timedelta(seconds=1)
    scene.run()
    assert not scene.closings()
    scene.now += ENGINE_PATIENCE
    scene.run()
    assert scene.closings() == ["void"]
    scene.commit_queue.stop()


@pytest.mark.parametrize("full", ["the disk", "the database"])
def test_a_full_disk_refuses_what_is_new_and_loses_nothing(tmp_path: Path, full: str) -> None:
    """SQLite: StoreUnavailable, which is a 503; what was held is closed once there is room."""
    with small_disk(tmp_path / "disk", 4 << 20 if full == "the disk" else 64 << 20) as disk:
        if full == "the disk" and not disk.is_mount():
            pytest.skip("tmpfs may not be mounted here")
        with closing(Store(f"sqlite:///{disk}/ledger.db")) as store:
            onboard(store, tmp_path, ["acme"])
            ledger, ballast = Ledger(store), disk / "ballast"
            if full == "the disk":
                _fill(ballast, leaving=256 << 10)
            else:
                _bound(store, 40)
            held: list[Hold] = []

            def hold_more() -> None:
                for number in range(10_000):
                    hold = Hold(f"req_{number:04}", "acme", 1000, terms="x" * 500)
                    ledger.hold(hold, at=NOON, lease=LEASE)
                    held.append(hold)

            with pytest.raises(StoreUnavailable):
                hold_more()
            assert held
            # It can still be read, and what was refused has left nothing behind.
            open_ids = [one.hold.request_id for one in ledger.open_holds()]
            assert open_ids == [one.request_id for one in held]
            assert ledger.account("acme").held_nanos == 1000 * len(held)

            if full == "the disk":
                ballast.unlink()
            else:
                _bound(store, 4000)
            for hold in held:
                assert ledger.void(hold, "there is room again", at=NOON)
            assert ledger.account("acme").held_nanos == 0
            assert [check for check in verify(store) if check.mismatches] == []


def _fill(ballast: Path, *, leaving: int) -> None:
    """Fill the disk but for `leaving` bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * 4096) == 4096:
                pass
        except OSError:
            pass
        file.truncate(file.tell() - leaving)


def _bound(store: Store, pages: int) -> None:
    """Let the database grow by `pages` and no more."""
    with store.read() as connection:
        count = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    def bound(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count = {count + pages}")

    sa.event.listen(store._engine, "connect", bound)
    store.close()  # its connections: the new ones are bound
