"""Tests that usage queries are exact, and that verification detects each kind of damage."""

from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from serve.billing.budgets.service import BudgetService
from serve.billing.ledger.accounts import transfer
from serve.billing.ledger.holds import Hold, Resolution
from serve.billing.ledger.verification import verify
from serve.billing.metering.events import FailedAttempt, usage_table
from serve.billing.metering.queries import DAY, HOUR, MINUTE, UsageQueries, UsageQuery, floor, split_by_table
from serve.billing.metering.rollups import hours_table, rebuild, rollup_drift
from serve.cli import app
from serve.errors import InvalidRequest
from serve.storage.database import Store
from serve.tenants.audit import Audit
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.databases import on_sqlite
from tests.support.usage_events import usage_event

MIDNIGHT = NOON.replace(hour=0)
LEASE = timedelta(minutes=5)


def use(shop: BillingFixture, *times: datetime, **changes: object) -> None:
    """Settle one request of 1000 nano-USD at each of `times`."""
    for at in times:
        with shop.store.read() as connection:
            number = connection.execute(sa.select(sa.func.count()).select_from(usage_table)).scalar_one()
        hold = Hold(f"r{number}", "acme", 2000, key_id=shop.principal.key_id)
        shop.ledger.hold(hold, at=at, lease=LEASE)
        event = usage_event(
            hold.request_id,
            key_id=shop.principal.key_id,
            plan_id=shop.price.id,
            at=at,
            **{"samples": 2, "cost_nanos": 1000} | changes,
        )
        assert shop.ledger.settle(hold, event, at=at)


def count(shop: BillingFixture, start: datetime, end: datetime, width: timedelta | None = None) -> int:
    return sum(used.requests for used in UsageQueries(shop.store).query(UsageQuery(start, end, width)))


def damage(store: Store, statement: str) -> None:
    with store.write() as connection:
        connection.execute(sa.text(statement))


@pytest.mark.parametrize("width", [MINUTE, HOUR, DAY, None])
def test_any_two_moments_hold_exactly_what_was_used_between_them(
    shop: BillingFixture, width: timedelta | None
) -> None:
    use(shop, *(MIDNIGHT + timedelta(minutes=25 * number, seconds=number) for number in range(12)))
    edges = [MIDNIGHT + timedelta(minutes=minutes) for minutes in (0, 25, 50, 51, 60, 120, 200, 299, 300)]
    for start in edges:
        for end in (edge for edge in edges if edge > start):
            expected = sum(
                start <= MIDNIGHT + timedelta(minutes=25 * number, seconds=number) < end
                for number in range(12)
            )
            assert count(shop, start, end, width) == expected, (start, end)


def test_totals_of_a_cut_hour_are_those_of_its_events(shop: BillingFixture) -> None:
    use(shop, MIDNIGHT, NOON, NOON + timedelta(minutes=30))
    totals = UsageQueries(shop.store).totals(start=NOON - HOUR / 2, end=NOON + HOUR / 2)
    assert [(total.requests, total.cost_nanos) for total in totals] == [(1, 1000)]
    assert UsageQueries(shop.store).totals()[0].requests == 3


def test_more_groups_than_allowed_are_refused(shop: BillingFixture) -> None:
    use(shop, MIDNIGHT, MIDNIGHT + DAY)
    question = UsageQuery(MIDNIGHT, MIDNIGHT + 2 * DAY, groups_max=1)
    with pytest.raises(InvalidRequest):
        UsageQueries(shop.store).query(question)
    assert len(UsageQueries(shop.store).query(replace(question, groups_max=2))) == 2


def test_the_parts_of_a_window_are_disjoint_and_complete() -> None:
    for minutes in (0, 10, 59, 60, 61, 125, 3000):
        for first in (0, 1, 59):
            start = MIDNIGHT + timedelta(minutes=first)
            end = start + timedelta(minutes=minutes + 1)
            found = list(split_by_table(start, end, DAY))
            assert (found[0][1], found[-1][2]) == (start, end)
            assert all(one[2] == other[1] for one, other in pairwise(found))
            assert all(a == floor(a, HOUR) and b == floor(b, HOUR) for t, a, b in found if t is hours_table)


def busy(shop: BillingFixture) -> None:
    """Provides a shop with each kind of transfer."""
    key = shop.principal.key_id
    BudgetService(shop.store).create("acme", "tenant", "acme", "total", 10**9, at=MIDNIGHT)
    BudgetService(shop.store).create("acme", "key", key, "day", 10**9, at=MIDNIGHT, hard=False)
    use(shop, MIDNIGHT, NOON, NOON + HOUR)
    use(shop, NOON, tier="batch", model="acme/support", adapter_version="acme/support@1", cold_loads=1)
    shop.ledger.hold(Hold("void", "acme", 5, key_id=key), at=NOON, lease=LEASE)
    attempt = FailedAttempt(
        request_id="void",
        attempt=1,
        tenant="acme",
        model="tiny",
        replica="r",
        boot="b",
        error="EngineFailed",
        created_at=NOON,
        prompt_tokens=3,
        completion_tokens=2,
    )
    shop.ledger.apply([Resolution("void", "acme", NOON, reason="failed", failed=(attempt,))])
    shop.ledger.hold(Hold("open", "acme", 7, key_id=key), at=NOON, lease=LEASE)
    moves = {"grant": 10, "withdraw": 1, "expire": 2, "charge": 3, "refund": 4, "payment": 5}
    with shop.store.write() as connection:
        for kind, amount in moves.items():
            transfer(connection, "acme", kind, amount, reference=kind, reason="test", at=NOON)


def test_a_ledger_that_was_only_written_by_itself_agrees(shop: BillingFixture) -> None:
    busy(shop)
    checks = verify(shop.store)
    assert [one for one in checks if one.mismatches] == []
    assert sum(one.compared for one in checks) > 20
    assert [rollup_drift(shop.store, (MIDNIGHT + days * DAY).date()) for days in (-1, 0, 1)] == [0, 0, 0]


DAMAGE = {
    "credit =": "UPDATE accounts SET credit_nanos = credit_nanos + 1",
    "spent =": "UPDATE accounts SET spent_nanos = spent_nanos - 1",
    "held =": "UPDATE accounts SET held_nanos = held_nanos + 1",
    "open holds =": "DELETE FROM open_holds",
    "hours =": "UPDATE usage_hours SET cached_tokens = cached_tokens + 1 WHERE model = 'tiny'",
    "engines'": "UPDATE engine_totals SET completion_tokens = completion_tokens + 1",
    "budgets hold": "UPDATE budget_spend SET held_nanos = held_nanos + 1",
    "budgets spent": "UPDATE budget_spend SET spent_nanos = spent_nanos + 100000",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_sum_that_is_wrong_is_found(shop: BillingFixture, name: str) -> None:
    busy(shop)
    damage(shop.store, DAMAGE[name])
    assert any(one.name.startswith(name) for one in verify(shop.store) if one.mismatches)


def test_a_settlement_without_its_event_is_found(shop: BillingFixture) -> None:
    busy(shop)
    row = "'ghost', 2, 'settle', 'acme', 'acme', 'revenue', 0, '2026-11-22 12:00:00'"
    names = "request_id, phase, kind, tenant_id, debit, credit, amount_nanos, created_at"
    damage(shop.store, f"INSERT INTO transfers ({names}) VALUES ({row})")
    wrong = {one.name: one.mismatches for one in verify(shop.store) if one.mismatches}
    assert set(wrong) >= {
        "settlements = usage events",
        "a settlement's amount = its event's cost (-1: it has none)",
    }


@pytest.mark.parametrize(
    "wreck",
    [
        "UPDATE usage_hours SET cost_nanos = cost_nanos + 1",
        "DELETE FROM usage_hours WHERE tier = 'batch'",
        "UPDATE usage_hours SET model = 'ghost' WHERE model = 'tiny'",
    ],
)
def test_a_day_is_made_anew_from_its_events(shop: BillingFixture, wreck: str) -> None:
    busy(shop)
    day, before = MIDNIGHT.date(), UsageQueries(shop.store).totals()
    damage(shop.store, wreck)
    wrong = rollup_drift(shop.store, day)
    assert wrong > 0
    assert rebuild(shop.store, day, actor="test", at=NOON) == wrong
    assert rollup_drift(shop.store, day) == 0
    assert UsageQueries(shop.store).totals() == before
    assert all(not one.mismatches for one in verify(shop.store))
    (entry,) = Audit(shop.store).entries(action="usage.rebuild")
    assert (entry.subject, entry.details["wrong"]) == ("2026-11-22", wrong)


def test_only_the_day_that_is_rebuilt_changes(shop: BillingFixture) -> None:
    use(shop, MIDNIGHT - timedelta(seconds=1), MIDNIGHT, MIDNIGHT + DAY)
    damage(shop.store, "DELETE FROM usage_hours")
    assert rebuild(shop.store, MIDNIGHT.date(), actor="test", at=NOON) == 1
    assert count(shop, MIDNIGHT - DAY, MIDNIGHT + 2 * DAY, DAY) == 1


@on_sqlite
def test_the_commands_show_forecast_and_verify(
    shop: BillingFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy(shop)
    monkeypatch.setenv("BESPOKE_DATABASE_URL", shop.store.url)

    def run(*words: str) -> str:
        return CliRunner().invoke(app, ["usage", *words, "--home", str(tmp_path)]).output

    assert "(batch)" in run("show")
    assert "2026-11-22" in run("show", "acme", "--by", "day", "--month", "2026-11")
    assert shop.principal.key_id in run("show", "--by", "key")
    assert "tiny" not in run("show", "--project", "none")
    assert "total" in run("forecast", "acme")
    assert "agrees with itself" in run("verify")
    damage(shop.store, "UPDATE accounts SET spent_nanos = spent_nanos + 1")
    broken = CliRunner().invoke(app, ["usage", "verify", "--home", str(tmp_path)])
    assert broken.exit_code != 0
    assert "spent" in broken.output
    assert "0 rows differed" in run("rebuild", "2026-11-22")
