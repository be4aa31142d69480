"""Tests which budgets apply, what they count and release, and which alerts they raise."""

import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from serve.billing.budgets.alerts import read_budget_metrics, send_due_alerts
from serve.billing.budgets.budgets import spend_table
from serve.billing.budgets.service import BudgetService, BudgetUsage
from serve.billing.ledger.holds import Hold, HoldRequest, Resolution
from serve.billing.metering.events import UsageEvent
from serve.billing.webhooks.delivery import secret_of
from serve.billing.webhooks.outbox import webhook_events_table
from serve.cli import app
from serve.commands.common import console
from serve.errors import (
    AlreadyExists,
    BudgetExceeded,
    Conflict,
    InsufficientCredit,
    InvalidRequest,
    UnknownRecord,
)
from serve.formats.errors import anthropic_body_of, body_of, status_of
from serve.observability.metrics import render_budgets
from serve.tenants import server_secret
from serve.tenants.audit import Audit
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.databases import on_sqlite
from tests.support.usage_events import usage_event

LEASE = timedelta(minutes=10)
HOOK = "https://hooks.example.com/budgets"


class Spender:
    """Makes a shop's requests with a key in a project."""

    def __init__(self, shop: BillingFixture) -> None:
        self.shop = shop
        self.project = shop.tenants.projects.create("acme", "web", at=NOON).id
        self.key = shop.tenants.keys.create("acme", at=NOON, project=self.project)[0].id
        self.budgets = BudgetService(shop.store)
        self.subjects = {"tenant": "acme", "project": self.project, "key": self.key}
        self.count = 0

    def budget(self, level: str, limit_nanos: int, period: str = "month", **terms: object) -> str:
        at = terms.pop("at", NOON)
        made = self.budgets.create(
            "acme",
            level,
            self.subjects[level],
            period,
            limit_nanos,
            at=at,
            **terms,  # type: ignore[arg-type]
        )
        return made.budget.id

    def hold(self, amount_nanos: int, *, at: datetime = NOON, key: str | None = None) -> Hold:
        self.count += 1
        who = {"project": None, "key_id": key} if key else {"project": self.project, "key_id": self.key}
        made = Hold(f"r{self.count}", "acme", amount_nanos, terms=json.dumps(who), **who)
        self.shop.ledger.hold(made, at=at, lease=LEASE)
        return made

    def event(self, hold: Hold, cost_nanos: int, at: datetime = NOON) -> UsageEvent:
        return usage_event(
            hold.request_id,
            key_id=hold.key_id or self.key,
            plan_id=self.shop.price.id,
            at=at,
            project=hold.project,
            cost_nanos=cost_nanos,
        )

    def settle(self, hold: Hold, cost_nanos: int, at: datetime = NOON) -> bool:
        return self.shop.ledger.settle(hold, self.event(hold, cost_nanos, at), at=at)

    def spend(self, cost_nanos: int, at: datetime = NOON) -> None:
        self.settle(self.hold(cost_nanos, at=at), cost_nanos, at)

    def usage_of(self, budget: str, at: datetime = NOON) -> tuple[int, int]:
        found: BudgetUsage = self.budgets.get("acme", budget, at=at)
        return found.spent_nanos, found.held_nanos


@pytest.fixture
def spender(shop: BillingFixture) -> Spender:
    return Spender(shop)


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
@pytest.mark.parametrize("period", ["day", "month", "total"])
def test_a_hard_budget_refuses_what_may_exceed_it_and_nothing_is_taken(
    spender: Spender, level: str, period: str
) -> None:
    budget = spender.budget(level, 1000, period)
    spender.settle(spender.hold(600), 500)
    spender.hold(400)
    with pytest.raises(BudgetExceeded) as refused:
        spender.hold(101)
    assert (refused.value.scope, refused.value.available_nanos) == (level, 100)
    assert spender.usage_of(budget) == (500, 400)
    assert spender.shop.ledger.account("acme").held_nanos == 400
    spender.hold(100)
    assert spender.usage_of(budget) == (500, 500)


def test_the_refusal_is_429_insufficient_quota_and_a_billing_error_to_anthropics_clients() -> None:
    error = BudgetExceeded("project", "month", 1000, 200, 100, "USD")
    assert status_of(error) == (429, "insufficient_quota", "insufficient_quota")
    assert "your project's month budget" in body_of(error)["error"]["message"]
    assert anthropic_body_of(error)["error"]["type"] == "billing_error"
    assert "acme" not in str(body_of(error))


def test_a_soft_budget_refuses_nothing_and_counts_all(spender: Spender) -> None:
    budget = spender.budget("tenant", 100, hard=False)
    spender.spend(250)
    spender.hold(50)
    assert spender.usage_of(budget) == (250, 50)


def test_a_refused_third_level_leaves_nothing_on_the_first_two(spender: Spender) -> None:
    made = [spender.budget("tenant", 1000), spender.budget("project", 1000), spender.budget("key", 10)]
    with pytest.raises(BudgetExceeded) as refused:
        spender.hold(11)
    assert refused.value.scope == "key"
    assert [spender.usage_of(one) for one in made] == [(0, 0)] * 3
    account = spender.shop.ledger.account("acme")
    assert (account.held_nanos, account.spent_nanos) == (0, 0)


def test_in_one_transaction_of_many_the_refused_leave_the_others_alone(spender: Spender) -> None:
    budget = spender.budget("key", 100)
    holds = [
        Hold(f"many-{i}", "acme", amount, spender.project, spender.key)
        for i, amount in enumerate((60, 60, 40))
    ]
    outcomes = spender.shop.ledger.apply([HoldRequest(hold, NOON, LEASE) for hold in holds])
    assert [outcome is True for outcome in outcomes] == [True, False, True]
    assert spender.usage_of(budget) == (0, 100)
    closings = [Resolution(hold.request_id, "acme", NOON) for hold in holds]
    assert spender.shop.ledger.apply(closings) == [True, False, True]
    assert spender.usage_of(budget) == (0, 0)


def test_other_keys_and_projects_are_not_bound(spender: Spender) -> None:
    spender.budget("project", 0)
    spender.budget("key", 0)
    spender.hold(10, key=spender.shop.principal.key_id)
    with pytest.raises(BudgetExceeded):
        spender.hold(1)


def test_the_credit_still_ends_at_nothing(spender: Spender) -> None:
    budget = spender.budget("tenant", 10**12)
    spender.spend(900_000_000)
    with pytest.raises(InsufficientCredit) as refused:
        spender.hold(100_000_001)
    assert type(refused.value) is InsufficientCredit
    assert spender.usage_of(budget) == (900_000_000, 0)


def test_a_new_period_begins_with_nothing_spent(spender: Spender) -> None:
    late = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    day, month, total = (
        spender.budget("tenant", 100, period, at=late) for period in ("day", "month", "total")
    )
    spender.spend(90, late)
    with pytest.raises(BudgetExceeded):
        spender.hold(20, at=late)
    after = late + timedelta(minutes=1)
    assert [spender.usage_of(one, after) for one in (day, month, total)] == [(0, 0), (0, 0), (90, 0)]
    with pytest.raises(BudgetExceeded) as refused:
        spender.hold(20, at=after)
    assert refused.value.period == "total"


def test_a_request_is_counted_in_the_period_in_which_it_was_admitted(spender: Spender) -> None:
    late = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    budget = spender.budget("tenant", 100, at=late)
    hold = spender.hold(50, at=late)
    after = late + timedelta(minutes=2)
    spender.settle(hold, 30, after)
    assert spender.usage_of(budget, late) == (30, 0)
    assert spender.usage_of(budget, after) == (0, 0)


def test_periods_are_utc_whatever_the_zone_of_the_clock(spender: Spender) -> None:
    budget = spender.budgets.get("acme", spender.budget("tenant", 1, "day"), at=NOON).budget
    assert budget.period_at(datetime.fromisoformat("2026-11-24T01:00:00+02:00")) == "2026-11-23"


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
@pytest.mark.parametrize(("period", "before"), [("day", 5), ("month", 15), ("total", 40)])
def test_a_new_budget_begins_with_what_its_subject_spent_and_holds(
    spender: Spender, level: str, period: str, before: int
) -> None:
    spender.spend(25, NOON - timedelta(days=40))
    spender.spend(10, NOON - timedelta(days=2))
    spender.spend(5, NOON - timedelta(hours=2))
    open_hold = spender.hold(7)
    other = spender.hold(100, key=spender.shop.principal.key_id)
    spender.settle(other, 60)
    mine = before + (60 if level == "tenant" else 0)
    budget = spender.budget(level, 1000, period)
    assert spender.usage_of(budget) == (mine, 7)
    assert spender.settle(open_hold, 3)
    assert spender.usage_of(budget) == (mine + 3, 0)


def test_a_budget_made_in_mid_request_binds_it_once_however_many_follow(spender: Spender) -> None:
    first = spender.hold(100)
    tenant, key = spender.budget("tenant", 1000), spender.budget("key", 1000, "day")
    second = spender.hold(50)
    assert (spender.usage_of(tenant), spender.usage_of(key)) == ((0, 150), (0, 150))
    spender.shop.ledger.void(first, "test", at=NOON)
    spender.settle(second, 20)
    assert (spender.usage_of(tenant), spender.usage_of(key)) == ((20, 0), (20, 0))


def test_a_budget_retired_or_changed_in_mid_request_gets_back_what_was_taken(spender: Spender) -> None:
    retired, changed = spender.budget("tenant", 1000), spender.budget("key", 1000)
    hold = spender.hold(500)
    spender.budgets.retire("acme", retired, at=NOON)
    spender.budgets.change("acme", changed, {"limit_nanos": 10, "hard": False}, at=NOON)
    spender.hold(600)  # nothing binds it now
    spender.settle(hold, 400)
    assert spender.usage_of(retired) == (400, 0)
    assert spender.usage_of(changed) == (400, 600)
    with pytest.raises(Conflict):
        spender.budgets.change("acme", retired, {"limit_nanos": 2000}, at=NOON)


def test_a_limit_that_is_lowered_below_what_is_spent_refuses_the_next_request(spender: Spender) -> None:
    budget = spender.budget("project", 1000)
    spender.spend(500)
    spender.budgets.change("acme", budget, {"limit_nanos": 400}, at=NOON)
    with pytest.raises(BudgetExceeded) as refused:
        spender.hold(1)
    assert refused.value.available_nanos == 0
    spender.budgets.change("acme", budget, {"limit_nanos": 501}, at=NOON)
    spender.hold(1)


def test_what_is_not_the_tenants_looks_like_what_is_not_there(spender: Spender) -> None:
    spender.shop.tenants.create("rival", at=NOON)
    theirs = spender.shop.tenants.projects.create("rival", "web", at=NOON).id
    their_key = spender.shop.tenants.create_key("rival", at=NOON)[0].id
    make = spender.budgets.create
    for level, subject in (("project", theirs), ("key", their_key), ("project", "proj_x"), ("key", "key_x")):
        with pytest.raises(UnknownRecord, match=f"The tenant 'acme' has no {level} '{subject}'."):
            make("acme", level, subject, "month", 1, at=NOON)
    with pytest.raises(UnknownRecord, match="There is no tenant 'nobody'"):
        make("nobody", "tenant", "nobody", "month", 1, at=NOON)
    budget = spender.budget("tenant", 1)
    for tenant in ("rival", "nobody"):
        with pytest.raises(UnknownRecord, match=f"The tenant '{tenant}' has no budget '{budget}'."):
            spender.budgets.get(tenant, budget, at=NOON)
        with pytest.raises(UnknownRecord):
            spender.budgets.change(tenant, budget, {"limit_nanos": 2}, at=NOON)
        with pytest.raises(UnknownRecord):
            spender.budgets.retire(tenant, budget, at=NOON)


def test_a_subject_has_one_budget_for_a_period_and_may_have_another_when_it_is_retired(
    spender: Spender,
) -> None:
    first = spender.budget("key", 5)
    with pytest.raises(AlreadyExists):
        spender.budget("key", 6)
    spender.budget("key", 6, "day")
    spender.budgets.retire("acme", first, at=NOON)
    spender.budget("key", 6)
    found = spender.budgets.page("acme", at=NOON).items
    assert sorted(one.budget.limit_nanos for one in found) == [5, 6, 6]


def test_of_many_who_make_the_same_budget_one_does(spender: Spender) -> None:
    spender.shop.tenants.create("new", at=NOON)  # which has no account to lock

    def make(_: int) -> bool:
        try:
            BudgetService(spender.shop.store).create("new", "tenant", "new", "day", 5, at=NOON)
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(make, range(6))) == 1


WRONG = [
    {"limit_nanos": -1},
    {"limit_nanos": 10**18 + 1},
    {"notify_pcts": (0,)},
    {"notify_pcts": (201,)},
    {"notify_pcts": tuple(range(1, 10))},
    {"webhook_url": "http://example.com"},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_is_out_of_bounds_is_refused_when_made_and_when_changed(
    spender: Spender, wrong: dict[str, object]
) -> None:
    terms = {"limit_nanos": 5} | wrong
    with pytest.raises(InvalidRequest):
        spender.budget("tenant", **terms)  # type: ignore[arg-type]
    budget = spender.budget("tenant", 5)
    with pytest.raises(InvalidRequest):
        spender.budgets.change("acme", budget, wrong, at=NOON)
    assert spender.budgets.get("acme", budget, at=NOON).budget.limit_nanos == 5


def test_all_that_is_done_is_written_down_without_the_webhooks_path(spender: Spender) -> None:
    budget = spender.budget("tenant", 5, webhook_url=HOOK + "?token=hidden")
    spender.budgets.change("acme", budget, {"limit_nanos": 6}, at=NOON, actor="command:ann")
    spender.budgets.retire("acme", budget, at=NOON)
    spender.budgets.retire("acme", budget, at=NOON)
    log = [one for one in Audit(spender.shop.store).entries(tenant="acme") if one.subject == budget]
    assert [one.action for one in log] == ["budget.retire", "budget.change", "budget.create"]
    assert (log[1].actor, log[1].details) == ("command:ann", {"limit_nanos": 6})
    assert log[2].details["webhook_url"] == "hooks.example.com"
    assert "hidden" not in str(log)


def test_each_threshold_is_told_once_in_each_period(
    spender: Spender, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "serve.billing.budgets.alerts")
    budget = spender.budget("project", 100, "day", webhook_url=HOOK, hard=False)
    store, told = spender.shop.store, []
    for cost, at in (
        (49, NOON),
        (1, NOON),
        (10, NOON),
        (45, NOON),
        (30, NOON),
        (50, NOON + timedelta(days=1)),
    ):
        spender.spend(cost, at)
        told.append([one.threshold_pct for one in send_due_alerts(store, at) + send_due_alerts(store, at)])
    assert told == [[], [50], [], [100], [], [50]]
    with store.read() as connection:
        query = sa.select(webhook_events_table).order_by(
            webhook_events_table.c.created_at, webhook_events_table.c.body
        )
        rows = connection.execute(query).all()
    assert {row.url for row in rows} == {HOOK}
    assert [json.loads(row.body)["id"] for row in rows] == [row.id for row in rows]
    last = json.loads(rows[-1].body)
    assert last["type"] == "budget.threshold"
    assert last["data"] == {
        "budget": budget,
        "tenant": "acme",
        "level": "project",
        "subject": spender.project,
        "period": "2026-11-23",
        "threshold_pct": 50,
        "spent_nanos": 50,
        "limit_nanos": 100,
        "currency": "USD",
        "hard": False,
    }
    assert len(caplog.messages) == 3
    assert f"budget={budget} tenant=acme level=project" in caplog.messages[0]
    assert HOOK not in caplog.text


def test_a_threshold_is_told_once_whoever_looks(spender: Spender) -> None:
    for level in ("tenant", "project", "key"):
        spender.budget(level, 100, hard=False)
    spender.spend(80)
    with ThreadPoolExecutor(6) as pool:
        told = [
            one
            for found in pool.map(lambda _: send_due_alerts(spender.shop.store, NOON), range(6))
            for one in found
        ]
    assert sorted(one.budget.scope for one in told) == ["key", "project", "tenant"]
    assert {one.threshold_pct for one in told} == {80}


def test_what_was_spent_in_a_periods_last_seconds_is_told_in_the_next(spender: Spender) -> None:
    late = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    spender.budget("tenant", 100, at=late)
    spender.spend(100, late)
    (told,) = send_due_alerts(spender.shop.store, late + timedelta(seconds=5))
    assert told.span == "2026-11"


def test_a_raised_limit_makes_thresholds_tell_again_and_a_lowered_one_tells_at_once(spender: Spender) -> None:
    budget = spender.budget("tenant", 100)
    store = spender.shop.store
    spender.spend(80)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [80]
    spender.budgets.change("acme", budget, {"limit_nanos": 200}, at=NOON)
    assert send_due_alerts(store, NOON) == []
    spender.spend(20)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [50]
    spender.budgets.change("acme", budget, {"limit_nanos": 100}, at=NOON)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [100]


def test_nothing_is_told_of_what_is_retired_or_has_not_been_used(spender: Spender) -> None:
    spender.budget("project", 0)
    retired = spender.budget("tenant", 100)
    spender.settle(spender.hold(100, key=spender.shop.principal.key_id), 100)
    spender.budgets.retire("acme", retired, at=NOON)
    assert send_due_alerts(spender.shop.store, NOON) == []


def test_the_largest_limit_neither_overflows_nor_tells_too_early(spender: Spender) -> None:
    budget = spender.budget("tenant", 10**18, notify_pcts=(100, 200))
    with spender.shop.store.write() as connection:
        connection.execute(spend_table.update().values(spent_nanos=10**18 - 1))
    assert send_due_alerts(spender.shop.store, NOON) == []
    with spender.shop.store.write() as connection:
        connection.execute(spend_table.update().values(spent_nanos=2 * 10**18))
    assert [one.threshold_pct for one in send_due_alerts(spender.shop.store, NOON)] == [200]
    assert spender.usage_of(budget)[0] == 2 * 10**18


def test_the_metrics_name_the_fullest_budgets_by_id(
    spender: Spender, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, half = spender.budget("tenant", 100, hard=False), spender.budget("project", 200)
    spender.budget("key", 1000)
    spender.spend(100)
    send_due_alerts(spender.shop.store, NOON)
    monkeypatch.setattr("serve.billing.budgets.alerts.SHOWN_MAX", 2)
    shown = read_budget_metrics(spender.shop.store, NOON)
    text = render_budgets(shown).decode()
    samples = {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples == {(full, "tenant", "month"): 1.0, (half, "project", "month"): 0.5, (): 2.0}


def test_an_event_of_a_failed_settlement_moves_no_budget(spender: Spender) -> None:
    budget = spender.budget("tenant", 1000)
    first, second = spender.hold(100), spender.hold(100)
    spender.settle(first, 10)
    with pytest.raises(sa.exc.IntegrityError):
        spender.shop.ledger.settle(second, replace(spender.event(second, 20), request_id="r1"), at=NOON)
    assert spender.usage_of(budget) == (10, 100)


@on_sqlite
def test_budgets_are_set_shown_and_retired_by_command(
    spender: Spender, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESPOKE_DATABASE_URL", spender.shop.store.url)
    monkeypatch.setattr(console, "width", 200)

    def say(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["budget", *arguments, "--home", str(tmp_path)])
        assert done.exit_code == code, done.output
        return done.output

    made = say("set", "acme", "--limit", "50", "--project", spender.project, "--webhook", HOOK)
    budget = re.findall(r"bud_\w+", made)[0]
    assert "may spend 50.00 USD (month)" in made
    again = say("set", "acme", "--limit", "60.5", "--project", spender.project, "--soft", "--notify", "90")
    assert budget in again
    assert "is expected to spend 60.50 USD" in again
    shown = say("show", "acme", budget)
    assert "notifies at: 90 %" in shown
    assert "webhook: none" in shown
    assert f"retired {budget}" in say("retire", "acme", budget)
    assert "soft" in say("list", "acme")
    assert say("secret", "acme").strip() == secret_of(server_secret(tmp_path), "acme")
    for wrong in (["--limit", "x"], ["--limit", "1", "--notify", "x"]):
        say("set", "acme", *wrong, code=2)
    say("set", "acme", "--limit", "1", "--project", "p", "--key", "k", code=2)
    assert spender.budgets.get("acme", budget, at=NOON).budget.limit_nanos == 60_500_000_000
