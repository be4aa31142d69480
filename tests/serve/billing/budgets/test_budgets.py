"""Budgets: what binds, what is counted, what is given back, and what is told."""

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

from serve.billing.budgets.alerts import figures, send_due_alerts
from serve.billing.budgets.budgets import spend_table
from serve.billing.budgets.service import BudgetService, BudgetUsage
from serve.billing.ledger.ledger import Hold, HoldRequest, Resolution
from serve.billing.metering.events import UsageEvent
from serve.billing.webhooks.delivery import secret_of
from serve.billing.webhooks.outbox import notices_table
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


class Till:
    """A shop's requests, by a key in a project."""

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

    def standing(self, budget: str, at: datetime = NOON) -> tuple[int, int]:
        found: BudgetUsage = self.budgets.get("acme", budget, at=at)
        return found.spent_nanos, found.held_nanos


@pytest.fixture
def till(shop: BillingFixture) -> Till:
    return Till(shop)


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
@pytest.mark.parametrize("period", ["day", "month", "total"])
def test_a_hard_budget_refuses_what_may_exceed_it_and_nothing_is_taken(
    till: Till, level: str, period: str
) -> None:
    budget = till.budget(level, 1000, period)
    till.settle(till.hold(600), 500)
    till.hold(400)
    with pytest.raises(BudgetExceeded) as refused:
        till.hold(101)
    assert (refused.value.scope, refused.value.available_nanos) == (level, 100)
    assert till.standing(budget) == (500, 400)
    assert till.shop.ledger.account("acme").held_nanos == 400
    till.hold(100)
    assert till.standing(budget) == (500, 500)


def test_the_refusal_is_429_insufficient_quota_and_a_billing_error_to_anthropics_clients() -> None:
    error = BudgetExceeded("project", "month", 1000, 200, 100)
    assert status_of(error) == (429, "insufficient_quota", "insufficient_quota")
    assert "your project's month budget" in body_of(error)["error"]["message"]
    assert anthropic_body_of(error)["error"]["type"] == "billing_error"
    assert "acme" not in str(body_of(error))


def test_a_soft_budget_refuses_nothing_and_counts_all(till: Till) -> None:
    budget = till.budget("tenant", 100, hard=False)
    till.spend(250)
    till.hold(50)
    assert till.standing(budget) == (250, 50)


def test_a_refused_third_level_leaves_nothing_on_the_first_two(till: Till) -> None:
    made = [till.budget("tenant", 1000), till.budget("project", 1000), till.budget("key", 10)]
    with pytest.raises(BudgetExceeded) as refused:
        till.hold(11)
    assert refused.value.scope == "key"
    assert [till.standing(one) for one in made] == [(0, 0)] * 3
    account = till.shop.ledger.account("acme")
    assert (account.held_nanos, account.spent_nanos) == (0, 0)


def test_in_one_transaction_of_many_the_refused_leave_the_others_alone(till: Till) -> None:
    budget = till.budget("key", 100)
    holds = [
        Hold(f"many-{i}", "acme", amount, till.project, till.key) for i, amount in enumerate((60, 60, 40))
    ]
    outcomes = till.shop.ledger.apply([HoldRequest(hold, NOON, LEASE) for hold in holds])
    assert [outcome is True for outcome in outcomes] == [True, False, True]
    assert till.standing(budget) == (0, 100)
    closings = [Resolution(hold.request_id, "acme", NOON) for hold in holds]
    assert till.shop.ledger.apply(closings) == [True, False, True]
    assert till.standing(budget) == (0, 0)


def test_other_keys_and_projects_are_not_bound(till: Till) -> None:
    till.budget("project", 0)
    till.budget("key", 0)
    till.hold(10, key=till.shop.principal.key_id)
    with pytest.raises(BudgetExceeded):
        till.hold(1)


def test_the_credit_still_ends_at_nothing(till: Till) -> None:
    budget = till.budget("tenant", 10**12)
    till.spend(900_000_000)
    with pytest.raises(InsufficientCredit) as refused:
        till.hold(100_000_001)
    assert type(refused.value) is InsufficientCredit
    assert till.standing(budget) == (900_000_000, 0)


def test_a_new_period_begins_with_nothing_spent(till: Till) -> None:
    late = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    day, month, total = (till.budget("tenant", 100, period, at=late) for period in ("day", "month", "total"))
    till.spend(90, late)
    with pytest.raises(BudgetExceeded):
        till.hold(20, at=late)
    after = late + timedelta(minutes=1)
    assert [till.standing(one, after) for one in (day, month, total)] == [(0, 0), (0, 0), (90, 0)]
    with pytest.raises(BudgetExceeded) as refused:
        till.hold(20, at=after)
    assert refused.value.period == "total"


def test_a_request_is_counted_in_the_period_in_which_it_was_admitted(till: Till) -> None:
    late = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    budget = till.budget("tenant", 100, at=late)
    hold = till.hold(50, at=late)
    after = late + timedelta(minutes=2)
    till.settle(hold, 30, after)
    assert till.standing(budget, late) == (30, 0)
    assert till.standing(budget, after) == (0, 0)


def test_periods_are_utc_whatever_the_zone_of_the_clock(till: Till) -> None:
    budget = till.budgets.get("acme", till.budget("tenant", 1, "day"), at=NOON).budget
    assert budget.period_at(datetime.fromisoformat("2026-11-24T01:00:00+02:00")) == "2026-11-23"


@pytest.mark.parametrize("level", ["tenant", "project", "key"])
@pytest.mark.parametrize(("period", "before"), [("day", 5), ("month", 15), ("total", 40)])
def test_a_new_budget_begins_with_what_its_subject_spent_and_holds(
    till: Till, level: str, period: str, before: int
) -> None:
    till.spend(25, NOON - timedelta(days=40))
    till.spend(10, NOON - timedelta(days=2))
    till.spend(5, NOON - timedelta(hours=2))
    open_hold = till.hold(7)
    other = till.hold(100, key=till.shop.principal.key_id)
    till.settle(other, 60)
    mine = before + (60 if level == "tenant" else 0)
    budget = till.budget(level, 1000, period)
    assert till.standing(budget) == (mine, 7)
    assert till.settle(open_hold, 3)
    assert till.standing(budget) == (mine + 3, 0)


def test_a_budget_made_in_mid_request_binds_it_once_however_many_follow(till: Till) -> None:
    first = till.hold(100)
    tenant, key = till.budget("tenant", 1000), till.budget("key", 1000, "day")
    second = till.hold(50)
    assert (till.standing(tenant), till.standing(key)) == ((0, 150), (0, 150))
    till.shop.ledger.void(first, "test", at=NOON)
    till.settle(second, 20)
    assert (till.standing(tenant), till.standing(key)) == ((20, 0), (20, 0))


def test_a_budget_retired_or_changed_in_mid_request_gets_back_what_was_taken(till: Till) -> None:
    retired, changed = till.budget("tenant", 1000), till.budget("key", 1000)
    hold = till.hold(500)
    till.budgets.retire("acme", retired, at=NOON)
    till.budgets.change("acme", changed, {"limit_nanos": 10, "hard": False}, at=NOON)
    till.hold(600)  # nothing binds it now
    till.settle(hold, 400)
    assert till.standing(retired) == (400, 0)
    assert till.standing(changed) == (400, 600)
    with pytest.raises(Conflict):
        till.budgets.change("acme", retired, {"limit_nanos": 2000}, at=NOON)


def test_a_limit_that_is_lowered_below_what_is_spent_refuses_the_next_request(till: Till) -> None:
    budget = till.budget("project", 1000)
    till.spend(500)
    till.budgets.change("acme", budget, {"limit_nanos": 400}, at=NOON)
    with pytest.raises(BudgetExceeded) as refused:
        till.hold(1)
    assert refused.value.available_nanos == 0
    till.budgets.change("acme", budget, {"limit_nanos": 501}, at=NOON)
    till.hold(1)


def test_what_is_not_the_tenants_looks_like_what_is_not_there(till: Till) -> None:
    till.shop.tenants.create("rival", at=NOON)
    theirs = till.shop.tenants.projects.create("rival", "web", at=NOON).id
    their_key = till.shop.tenants.create_key("rival", at=NOON)[0].id
    make = till.budgets.create
    for level, subject in (("project", theirs), ("key", their_key), ("project", "proj_x"), ("key", "key_x")):
        with pytest.raises(UnknownRecord, match=f"The tenant 'acme' has no {level} '{subject}'."):
            make("acme", level, subject, "month", 1, at=NOON)
    with pytest.raises(UnknownRecord, match="There is no tenant 'nobody'"):
        make("nobody", "tenant", "nobody", "month", 1, at=NOON)
    budget = till.budget("tenant", 1)
    for tenant in ("rival", "nobody"):
        with pytest.raises(UnknownRecord, match=f"The tenant '{tenant}' has no budget '{budget}'."):
            till.budgets.get(tenant, budget, at=NOON)
        with pytest.raises(UnknownRecord):
            till.budgets.change(tenant, budget, {"limit_nanos": 2}, at=NOON)
        with pytest.raises(UnknownRecord):
            till.budgets.retire(tenant, budget, at=NOON)


def test_a_subject_has_one_budget_for_a_period_and_may_have_another_when_it_is_retired(till: Till) -> None:
    first = till.budget("key", 5)
    with pytest.raises(AlreadyExists):
        till.budget("key", 6)
    till.budget("key", 6, "day")
    till.budgets.retire("acme", first, at=NOON)
    till.budget("key", 6)
    found = till.budgets.page("acme", at=NOON).items
    assert sorted(one.budget.limit_nanos for one in found) == [5, 6, 6]


def test_of_many_who_make_the_same_budget_one_does(till: Till) -> None:
    till.shop.tenants.create("new", at=NOON)  # which has no account to lock

    def make(_: int) -> bool:
        try:
            BudgetService(till.shop.store).create("new", "tenant", "new", "day", 5, at=NOON)
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
    till: Till, wrong: dict[str, object]
) -> None:
    terms = {"limit_nanos": 5} | wrong
    with pytest.raises(InvalidRequest):
        till.budget("tenant", **terms)  # type: ignore[arg-type]
    budget = till.budget("tenant", 5)
    with pytest.raises(InvalidRequest):
        till.budgets.change("acme", budget, wrong, at=NOON)
    assert till.budgets.get("acme", budget, at=NOON).budget.limit_nanos == 5


def test_all_that_is_done_is_written_down_without_the_webhooks_path(till: Till) -> None:
    budget = till.budget("tenant", 5, webhook_url=HOOK + "?token=hidden")
    till.budgets.change("acme", budget, {"limit_nanos": 6}, at=NOON, actor="command:ann")
    till.budgets.retire("acme", budget, at=NOON)
    till.budgets.retire("acme", budget, at=NOON)
    log = [one for one in Audit(till.shop.store).entries(tenant="acme") if one.subject == budget]
    assert [one.action for one in log] == ["budget.retire", "budget.change", "budget.create"]
    assert (log[1].actor, log[1].details) == ("command:ann", {"limit_nanos": 6})
    assert log[2].details["webhook_url"] == "hooks.example.com"
    assert "hidden" not in str(log)


def test_each_threshold_is_told_once_in_each_period(till: Till, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "serve.billing.budgets.alerts")
    budget = till.budget("project", 100, "day", webhook_url=HOOK, hard=False)
    store, told = till.shop.store, []
    for cost, at in (
        (49, NOON),
        (1, NOON),
        (10, NOON),
        (45, NOON),
        (30, NOON),
        (50, NOON + timedelta(days=1)),
    ):
        till.spend(cost, at)
        told.append([one.threshold_pct for one in send_due_alerts(store, at) + send_due_alerts(store, at)])
    assert told == [[], [50], [], [100], [], [50]]
    with store.read() as connection:
        query = sa.select(notices_table).order_by(notices_table.c.created_at, notices_table.c.body)
        rows = connection.execute(query).all()
    assert {row.url for row in rows} == {HOOK}
    assert [json.loads(row.body)["id"] for row in rows] == [row.id for row in rows]
    last = json.loads(rows[-1].body)
    assert last["type"] == "budget.threshold"
    assert last["data"] == {
        "budget": budget,
        "tenant": "acme",
        "level": "project",
        "subject": till.project,
        "period": "2026-11-23",
        "threshold_pct": 50,
        "spent_nanos": 50,
        "limit_nanos": 100,
        "hard": False,
    }
    assert len(caplog.messages) == 3
    assert f"budget={budget} tenant=acme level=project" in caplog.messages[0]
    assert HOOK not in caplog.text


def test_a_threshold_is_told_once_whoever_looks(till: Till) -> None:
    for level in ("tenant", "project", "key"):
        till.budget(level, 100, hard=False)
    till.spend(80)
    with ThreadPoolExecutor(6) as pool:
        told = [
            one
            for found in pool.map(lambda _: send_due_alerts(till.shop.store, NOON), range(6))
            for one in found
        ]
    assert sorted(one.budget.scope for one in told) == ["key", "project", "tenant"]
    assert {one.threshold_pct for one in told} == {80}


def test_what_was_spent_in_a_periods_last_seconds_is_told_in_the_next(till: Till) -> None:
    late = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC)
    till.budget("tenant", 100, at=late)
    till.spend(100, late)
    (told,) = send_due_alerts(till.shop.store, late + timedelta(seconds=5))
    assert told.span == "2026-11"


def test_a_raised_limit_makes_thresholds_tell_again_and_a_lowered_one_tells_at_once(till: Till) -> None:
    budget = till.budget("tenant", 100)
    store = till.shop.store
    till.spend(80)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [80]
    till.budgets.change("acme", budget, {"limit_nanos": 200}, at=NOON)
    assert send_due_alerts(store, NOON) == []
    till.spend(20)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [50]
    till.budgets.change("acme", budget, {"limit_nanos": 100}, at=NOON)
    assert [one.threshold_pct for one in send_due_alerts(store, NOON)] == [100]


def test_nothing_is_told_of_what_is_retired_or_has_not_been_used(till: Till) -> None:
    till.budget("project", 0)
    retired = till.budget("tenant", 100)
    till.settle(till.hold(100, key=till.shop.principal.key_id), 100)
    till.budgets.retire("acme", retired, at=NOON)
    assert send_due_alerts(till.shop.store, NOON) == []


def test_the_largest_limit_neither_overflows_nor_tells_too_early(till: Till) -> None:
    budget = till.budget("tenant", 10**18, notify_pcts=(100, 200))
    with till.shop.store.write() as connection:
        connection.execute(spend_table.update().values(spent_nanos=10**18 - 1))
    assert send_due_alerts(till.shop.store, NOON) == []
    with till.shop.store.write() as connection:
        connection.execute(spend_table.update().values(spent_nanos=2 * 10**18))
    assert [one.threshold_pct for one in send_due_alerts(till.shop.store, NOON)] == [200]
    assert till.standing(budget)[0] == 2 * 10**18


def test_the_metrics_name_the_fullest_budgets_by_id(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    full, half = till.budget("tenant", 100, hard=False), till.budget("project", 200)
    till.budget("key", 1000)
    till.spend(100)
    send_due_alerts(till.shop.store, NOON)
    monkeypatch.setattr("serve.billing.budgets.alerts.SHOWN_MAX", 2)
    shown = figures(till.shop.store, NOON)
    text = render_budgets(shown).decode()
    samples = {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples == {(full, "tenant", "month"): 1.0, (half, "project", "month"): 0.5, (): 2.0}


def test_an_event_of_a_failed_settlement_moves_no_budget(till: Till) -> None:
    budget = till.budget("tenant", 1000)
    first, second = till.hold(100), till.hold(100)
    till.settle(first, 10)
    with pytest.raises(sa.exc.IntegrityError):
        till.shop.ledger.settle(second, replace(till.event(second, 20), request_id="r1"), at=NOON)
    assert till.standing(budget) == (10, 100)


@on_sqlite
def test_budgets_are_set_shown_and_retired_by_command(
    till: Till, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BESPOKE_DATABASE_URL", till.shop.store.url)
    monkeypatch.setattr(console, "width", 200)

    def say(*arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["budget", *arguments, "--home", str(tmp_path)])
        assert done.exit_code == code, done.output
        return done.output

    made = say("set", "acme", "--limit-usd", "50", "--project", till.project, "--webhook", HOOK)
    budget = re.findall(r"bud_\w+", made)[0]
    assert "may spend 50.00 USD (month)" in made
    again = say("set", "acme", "--limit-usd", "60.5", "--project", till.project, "--soft", "--notify", "90")
    assert budget in again
    assert "is expected to spend 60.50 USD" in again
    shown = say("show", "acme", budget)
    assert "notifies at: 90 %" in shown
    assert "webhook: none" in shown
    assert f"retired {budget}" in say("retire", "acme", budget)
    assert "soft" in say("list", "acme")
    assert say("secret", "acme").strip() == secret_of(server_secret(tmp_path), "acme")
    for wrong in (["--limit-usd", "x"], ["--limit-usd", "1", "--notify", "x"]):
        say("set", "acme", *wrong, code=2)
    say("set", "acme", "--limit-usd", "1", "--project", "p", "--key", "k", code=2)
    assert till.budgets.get("acme", budget, at=NOON).budget.limit_nanos == 60_500_000_000
