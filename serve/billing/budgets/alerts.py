"""Budget alerts report that spending reached a threshold, once per period: by log, metric and webhook."""

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.budgets.budgets import PERIODS, Budget, budget_of, budgets_table, spend_table
from serve.billing.pricing.currencies import currency_of
from serve.billing.webhooks import outbox
from serve.billing.webhooks.outbox import webhook_events_table
from serve.storage.database import Store

log = logging.getLogger(__name__)

KIND = "budget.threshold"
# Spending in the last seconds of a period still raises an alert after its end.
GRACE_PERIOD = timedelta(hours=1)
SHOWN_MAX = 100


@dataclass(frozen=True, slots=True)
class ThresholdAlert:
    """Reports that `spent_nanos` in the period `span` reached `threshold_pct` percent of the limit."""

    budget: Budget
    span: str
    threshold_pct: int
    spent_nanos: int
    currency: str


@dataclass(frozen=True, slots=True)
class BudgetMetrics:
    """Holds figures for /metrics. `used` are the fullest budgets now: (id, level, period, ratio)."""

    used: tuple[tuple[str, str, str, float], ...]
    alerts: int


def send_due_alerts(store: Store, at: datetime) -> list[ThresholdAlert]:
    """Raise an alert for each budget that reached a new threshold in its period.

    If it passed several thresholds, only the highest is reported. Two stewards may run this at a time.
    """
    alerts = []
    for budget_id, span in _candidates(store, at):
        if alert := _record_alert(store, budget_id, span, at):
            alerts.append(alert)
            budget = alert.budget
            log.warning(
                "%s budget=%s tenant=%s level=%s subject=%s period=%s threshold_pct=%d spent_nanos=%d "
                "limit_nanos=%d currency=%s",
                KIND,
                budget.id,
                budget.tenant,
                budget.scope,
                budget.subject,
                alert.span,
                alert.threshold_pct,
                alert.spent_nanos,
                budget.limit_nanos,
                alert.currency,
            )
    return alerts


def read_budget_metrics(store: Store, at: datetime) -> BudgetMetrics:
    """Return the `SHOWN_MAX` fullest budgets, and the number of alerts ever raised."""
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
        written = (
            sa.select(sa.func.count())
            .select_from(webhook_events_table)
            .where(webhook_events_table.c.kind == KIND)
        )
        return BudgetMetrics(used, connection.execute(written).scalar_one())


def _current(at: datetime, *earlier: datetime) -> sa.Select[Any]:
    """Select budgets in force with their spending in the periods of `at` and `earlier`, by period name.

    A day, a month and the total never share a name, so the name also determines the kind of period.
    """
    b, s = budgets_table.c, spend_table.c
    times = [time.astimezone(UTC) for time in (at, *earlier)]
    spans = sorted({time.strftime(form) for time in times for form in PERIODS.values()})
    joined = budgets_table.join(spend_table, s.budget_id == b.id)
    return (
        sa.select(b.id, s.period)
        .select_from(joined)
        .where(s.period.in_(spans), s.spent_nanos > 0, b.retired_at.is_(None))
    )


def _candidates(store: Store, at: datetime) -> list[tuple[str, str]]:
    b, s = budgets_table.c, spend_table.c
    # Divided first: 10¹⁸ × 100 does not fit into the store's 64 bits. `_record_alert` compares exactly.
    above = s.spent_nanos >= b.limit_nanos // 100 * (s.notified_pct + 1)
    query = _current(at, at - GRACE_PERIOD).with_only_columns(
        budgets_table, s.period.label("span"), s.spent_nanos, s.notified_pct
    )
    with store.read() as connection:
        return [
            (row.id, row.span)
            for row in connection.execute(query.where(above).order_by(b.id))
            if budget_of(row).reached_pct(row.spent_nanos) > row.notified_pct
        ]


def _record_alert(store: Store, budget_id: str, span: str, at: datetime) -> ThresholdAlert | None:
    """Record one alert in its own transaction: it holds no lock while it waits for a settlement."""
    b, s = budgets_table.c, spend_table.c
    same_period = (s.budget_id == budget_id, s.period == span)
    with store.write() as connection:
        spend = connection.execute(sa.select(spend_table).where(*same_period).with_for_update()).one()
        row = connection.execute(sa.select(budgets_table).where(b.id == budget_id)).one()
        budget, spent_nanos = budget_of(row), int(spend.spent_nanos)
        reached = budget.reached_pct(spent_nanos)
        update = (
            spend_table.update().where(*same_period, s.notified_pct < reached).values(notified_pct=reached)
        )
        if budget.retired_at is not None or connection.execute(update).rowcount == 0:
            return None
        alert = ThresholdAlert(budget, span, reached, spent_nanos, currency_of(connection, budget.tenant))
        event_id = f"ntc_{secrets.token_hex(12)}"
        body = json.dumps(_message(event_id, alert, at))
        outbox.enqueue(connection, event_id, budget.tenant, KIND, budget.webhook_url or "", body, at=at)
        return alert


def _message(event_id: str, alert: ThresholdAlert, at: datetime) -> Mapping[str, Any]:
    budget = alert.budget
    return {
        "id": event_id,
        "type": KIND,
        "created_at": int(at.timestamp()),
        "data": {
            "budget": budget.id,
            "tenant": budget.tenant,
            "level": budget.scope,
            "subject": budget.subject,
            "period": alert.span,
            "threshold_pct": alert.threshold_pct,
            "spent_nanos": alert.spent_nanos,
            "limit_nanos": budget.limit_nanos,
            "currency": alert.currency,
            "hard": budget.hard,
        },
    }
