"""Thresholds of budgets: told once for each period, by log line, metric and webhook, whoever looks first."""

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.budgets.budgets import PERIODS, Budget, budget_of, budgets_table, spend_table
from serve.billing.webhooks import outbox
from serve.billing.webhooks.outbox import notices_table
from serve.storage.database import Store

log = logging.getLogger(__name__)

KIND = "budget.threshold"
# What was spent in the last seconds of a period is still told.
GRACE = timedelta(hours=1)
SHOWN_MAX = 100


@dataclass(frozen=True, slots=True)
class Told:
    """That `spent_nanos` of the period `span` have reached `threshold_pct` percent of the budget's limit."""

    budget: Budget
    span: str
    threshold_pct: int
    spent_nanos: int


@dataclass(frozen=True, slots=True)
class BudgetFigures:
    """For /metrics. `used` has the fullest budgets of the current periods: (id, level, period, ratio)."""

    used: tuple[tuple[str, str, str, float], ...]
    notices: int


def send_due_alerts(store: Store, at: datetime) -> list[Told]:
    """Tell of each budget that has reached a threshold which was not told in this period.

    If several were passed at once, of the highest. Two stewards may do it at a time.
    """
    told = []
    for budget_id, span in _candidates(store, at):
        if one := _tell(store, budget_id, span, at):
            told.append(one)
            budget = one.budget
            log.warning(
                "%s budget=%s tenant=%s level=%s subject=%s period=%s threshold_pct=%d spent_nanos=%d "
                "limit_nanos=%d",
                KIND,
                budget.id,
                budget.tenant,
                budget.scope,
                budget.subject,
                one.span,
                one.threshold_pct,
                one.spent_nanos,
                budget.limit_nanos,
            )
    return told


def figures(store: Store, at: datetime) -> BudgetFigures:
    """The `SHOWN_MAX` fullest budgets, and how many notices were ever written."""
    b, s = budgets_table.c, spend_table.c
    ratio = sa.cast(s.spent_nanos, sa.Float) / sa.cast(b.limit_nanos, sa.Float)
    query = (
        _current(at)
        .with_only_columns(b.id, b.scope, b.period, ratio.label("ratio"))
        .where(b.limit_nanos > 0)
        .order_by(ratio.desc(), b.id)
        .limit(SHOWN_MAX)
    )
    with store.read() as connection:
        used = tuple((row.id, row.scope, row.period, float(row.ratio)) for row in connection.execute(query))
        written = sa.select(sa.func.count()).select_from(notices_table).where(notices_table.c.kind == KIND)
        return BudgetFigures(used, connection.execute(written).scalar_one())


def _current(at: datetime, *earlier: datetime) -> sa.Select[Any]:
    """Budgets in force and what they spent in the periods of `at` and `earlier`, found by the periods' names.

    No two kinds of period have a name in common, so a name says the budget's kind, too.
    """
    b, s = budgets_table.c, spend_table.c
    moments = [moment.astimezone(UTC) for moment in (at, *earlier)]
    spans = sorted({moment.strftime(form) for moment in moments for form in PERIODS.values()})
    joined = budgets_table.join(spend_table, s.budget_id == b.id)
    return (
        sa.select(b.id, s.period)
        .select_from(joined)
        .where(s.period.in_(spans), s.spent_nanos > 0, b.retired_at.is_(None))
    )


def _candidates(store: Store, at: datetime) -> list[tuple[str, str]]:
    b, s = budgets_table.c, spend_table.c
    # Divided first: 10¹⁸ × 100 does not fit into the store's 64 bits. `_tell` looks exactly.
    above = s.spent_nanos >= b.limit_nanos // 100 * (s.notified_pct + 1)
    query = _current(at, at - GRACE).with_only_columns(
        budgets_table, s.period.label("span"), s.spent_nanos, s.notified_pct
    )
    with store.read() as connection:
        return [
            (row.id, row.span)
            for row in connection.execute(query.where(above).order_by(b.id))
            if budget_of(row).reached_pct(row.spent_nanos) > row.notified_pct
        ]


def _tell(store: Store, budget_id: str, span: str, at: datetime) -> Told | None:
    """In a transaction of its own: it waits for no settlement while it keeps another waiting."""
    b, s = budgets_table.c, spend_table.c
    this = (s.budget_id == budget_id, s.period == span)
    with store.write() as connection:
        spend = connection.execute(sa.select(spend_table).where(*this).with_for_update()).one()
        row = connection.execute(sa.select(budgets_table).where(b.id == budget_id)).one()
        budget, spent_nanos = budget_of(row), int(spend.spent_nanos)
        reached = budget.reached_pct(spent_nanos)
        telling = spend_table.update().where(*this, s.notified_pct < reached).values(notified_pct=reached)
        if budget.retired_at is not None or connection.execute(telling).rowcount == 0:
            return None
        told = Told(budget, span, reached, spent_nanos)
        notice_id = f"ntc_{secrets.token_hex(12)}"
        body = json.dumps(_message(notice_id, told, at))
        outbox.write(connection, notice_id, budget.tenant, KIND, budget.webhook_url or "", body, at=at)
        return told


def _message(notice_id: str, told: Told, at: datetime) -> Mapping[str, Any]:
    budget = told.budget
    return {
        "id": notice_id,
        "type": KIND,
        "created_at": int(at.timestamp()),
        "data": {
            "budget": budget.id,
            "tenant": budget.tenant,
            "level": budget.scope,
            "subject": budget.subject,
            "period": told.span,
            "threshold_pct": told.threshold_pct,
            "spent_nanos": told.spent_nanos,
            "limit_nanos": budget.limit_nanos,
            "hard": budget.hard,
        },
    }
