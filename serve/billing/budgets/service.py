"""Budget service: creates, changes, retires and lists budgets, each with its current spending.

Every change locks the tenant's account first, as holds and settlements do. A new budget therefore starts
with exactly what its subject has spent in the current period and what its open requests hold.
"""

import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from serve.billing.budgets.budgets import (
    PERIODS,
    SCOPES,
    Budget,
    budget_of,
    budgets_table,
    spend_table,
)
from serve.billing.ledger.accounts import holds_table, lock_account
from serve.billing.metering.rollups import hours_table
from serve.billing.pricing.currencies import currency_of
from serve.billing.webhooks.delivery import check_url
from serve.errors import AlreadyExists, Conflict, InvalidRequest, UnknownRecord
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record

LIMIT_NANOS_MAX = 10**18
NOTIFY_PCTS = (50, 80, 100)
PCT_MAX, PCTS_MAX = 200, 8
PER_TENANT_MAX = 1000  # in force, because each hold of the tenant reads them

# Tables of `tenants`, declared as far as needed to check whether a subject exists.
_TENANTS = sa.table("tenants", sa.column("id"))
_SUBJECTS = {
    "project": sa.table("projects", sa.column("id"), sa.column("tenant_id")),
    "key": sa.table("api_keys", sa.column("id"), sa.column("tenant_id")),
}


@dataclass(frozen=True, slots=True)
class BudgetUsage:
    """Shows what is spent and held of a budget in the period `span` (2026-11-24, 2026-11, total)."""

    budget: Budget
    span: str
    spent_nanos: int
    held_nanos: int
    currency: str

    @property
    def left_nanos(self) -> int:
        return max(self.budget.limit_nanos - self.spent_nanos - self.held_nanos, 0)


class BudgetService:
    """Manages the budgets of one store. Methods block, and find only the given tenant's budgets."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def create(
        self,
        tenant: str,
        scope: str,
        subject: str,
        period: str,
        limit_nanos: int,
        *,
        at: datetime,
        hard: bool = True,
        notify_pcts: Sequence[int] = NOTIFY_PCTS,
        webhook_url: str | None = None,
        actor: str = SYSTEM,
    ) -> BudgetUsage:
        """Create a budget for `subject`. It applies from now on, and counts the current period's spending.

        Raises UnknownRecord for an unknown tenant or subject (another tenant's subject is unknown),
        AlreadyExists if the subject has a budget for this period, InvalidRequest for a value out of bounds,
        and Conflict if there are too many budgets.
        """
        budget = Budget(
            f"bud_{secrets.token_hex(8)}",
            tenant,
            scope,
            subject,
            period,
            limit_nanos,
            hard,
            tuple(sorted(set(notify_pcts))),
            webhook_url,
            at,
        )
        _check(budget)
        with self._store.write() as connection:
            lock_account(connection, tenant)
            _require_subject(connection, tenant, scope, subject)
            _require_capacity(connection, budget)
            connection.execute(budgets_table.insert(), _row(budget))
            _start_counting(connection, budget, at=at)
            audit_details = {"level": scope, "subject": subject, "period": period} | _audit_details(budget)
            record(connection, "budget.create", budget.id, audit_details, actor=actor, tenant=tenant, at=at)
            return _usage(connection, [budget], at=at)[0]

    def change(
        self, tenant: str, budget_id: str, changes: Mapping[str, Any], *, at: datetime, actor: str = SYSTEM
    ) -> BudgetUsage:
        """Change the fields in `changes`: limit_nanos, hard, notify_pcts, webhook_url.

        If a raised limit makes a threshold unreached, reaching it again raises a new alert. Raises
        UnknownRecord, Conflict if the budget is retired, InvalidRequest for a value out of bounds.
        """
        with self._store.write() as connection:
            lock_account(connection, tenant)
            budget = _get(connection, tenant, budget_id)
            if budget.retired_at is not None:
                raise Conflict(f"The budget '{budget_id}' is retired.")
            changed = replace(budget, **changes)
            changed = replace(changed, notify_pcts=tuple(sorted(set(changed.notify_pcts))))
            _check(changed)
            c = budgets_table.c
            connection.execute(budgets_table.update().where(c.id == budget_id).values(_row(changed)))
            _reset_unreached(connection, changed, at=at)
            audit_details = {
                name: value for name, value in _audit_details(changed).items() if name in changes
            }
            record(connection, "budget.change", budget_id, audit_details, actor=actor, tenant=tenant, at=at)
            return _usage(connection, [changed], at=at)[0]

    def retire(self, tenant: str, budget_id: str, *, at: datetime, actor: str = SYSTEM) -> BudgetUsage:
        """Retire a budget permanently. Open requests still release what they hold. Raises UnknownRecord."""
        with self._store.write() as connection:
            lock_account(connection, tenant)
            budget = _get(connection, tenant, budget_id)
            if budget.retired_at is None:
                c = budgets_table.c
                connection.execute(budgets_table.update().where(c.id == budget_id).values(retired_at=at))
                record(connection, "budget.retire", budget_id, actor=actor, tenant=tenant, at=at)
            return _usage(connection, [_get(connection, tenant, budget_id)], at=at)[0]

    def get(self, tenant: str, budget_id: str, *, at: datetime) -> BudgetUsage:
        """Return a budget. Raises UnknownRecord, also for another tenant's budget."""
        with self._store.read() as connection:
            return _usage(connection, [_get(connection, tenant, budget_id)], at=at)[0]

    def page(
        self, tenant: str, *, at: datetime, after: str | None = None, limit: int | None = None
    ) -> Page[BudgetUsage]:
        """Return budgets, oldest first, also retired ones. Raises InvalidRequest for a bad `after`."""
        with self._store.read() as connection:
            owned = budgets_table.c.tenant_id == tenant
            rows = page(connection, budgets_table, owned, after=after, limit=limit)
            budgets = [budget_of(row) for row in rows.items]
            return Page(_usage(connection, budgets, at=at), rows.has_more)


def _check(budget: Budget) -> None:
    """Check a budget's values. Raises InvalidRequest."""
    problem = None
    if budget.scope not in SCOPES:
        problem = ("level", f"must be one of {', '.join(SCOPES)}")
    elif budget.period not in PERIODS:
        problem = ("period", f"must be one of {', '.join(PERIODS)}")
    elif not 0 <= budget.limit_nanos <= LIMIT_NANOS_MAX:
        problem = ("limit_nanos", f"must be 0 to {LIMIT_NANOS_MAX}")
    elif len(budget.notify_pcts) > PCTS_MAX or not all(1 <= pct <= PCT_MAX for pct in budget.notify_pcts):
        problem = ("notify_pcts", f"must be at most {PCTS_MAX} percentages from 1 to {PCT_MAX}")
    if problem:
        raise InvalidRequest(f"'{problem[0]}' {problem[1]}.", problem[0], "invalid_value")
    if budget.webhook_url is not None:
        check_url(budget.webhook_url)


def _require_subject(connection: sa.Connection, tenant: str, scope: str, subject: str) -> None:
    # Locked, because a tenant without an account has no account lock to order two equal creations.
    tenant_query = sa.select(_TENANTS.c.id).where(_TENANTS.c.id == tenant).with_for_update(key_share=True)
    if connection.execute(tenant_query).first() is None:
        raise UnknownRecord(f"There is no tenant '{tenant}'.")
    if scope == "tenant":
        if subject != tenant:
            raise InvalidRequest("A tenant's budget is its own.", "level", "invalid_value")
        return
    c = _SUBJECTS[scope].c
    subject_query = sa.select(c.id).where(c.id == subject, c.tenant_id == tenant)
    if connection.execute(subject_query).first() is None:
        raise UnknownRecord(f"The tenant '{tenant}' has no {scope} '{subject}'.")


def _require_capacity(connection: sa.Connection, budget: Budget) -> None:
    c = budgets_table.c
    live_count = sa.select(sa.func.count()).where(c.tenant_id == budget.tenant, c.retired_at.is_(None))
    same_count = live_count.where(
        c.scope == budget.scope, c.subject == budget.subject, c.period == budget.period
    )
    if connection.execute(same_count).scalar_one():
        raise AlreadyExists(
            f"The {budget.scope} '{budget.subject}' has a budget for period '{budget.period}' already."
        )
    if connection.execute(live_count).scalar_one() >= PER_TENANT_MAX:
        raise Conflict(f"The tenant '{budget.tenant}' has {PER_TENANT_MAX} budgets; retire one first.")


def _start_counting(connection: sa.Connection, budget: Budget, *, at: datetime) -> None:
    """Store what the current period has spent, and add the budget to the subject's open holds."""
    held_by_period: dict[str, int] = defaultdict(int)
    held_by_period[budget.period_at(at)] = 0
    c = holds_table.c
    hold_updates = []
    for row in connection.execute(sa.select(holds_table).where(c.tenant_id == budget.tenant)):
        terms = json.loads(row.terms) if row.terms else {}
        if budget.binds(row.tenant_id, terms.get("project"), terms.get("key_id")):
            span = budget.period_at(row.created_at)
            held_by_period[span] += row.amount_nanos
            reservations = [*json.loads(row.budgets or "[]"), (budget.id, span)]
            hold_updates.append({"hold": row.request_id, "reserved": json.dumps(reservations)})
    spent_nanos = _spent_before(connection, budget, at=at)
    rows = [
        {
            "budget_id": budget.id,
            "period": span,
            "spent_nanos": spent_nanos if span == budget.period_at(at) else 0,
            "held_nanos": held_nanos,
            "notified_pct": 0,
        }
        for span, held_nanos in sorted(held_by_period.items())
    ]
    connection.execute(spend_table.insert(), rows)
    if hold_updates:
        update = holds_table.update().where(c.request_id == sa.bindparam("hold"))
        connection.execute(update.values(budgets=sa.bindparam("reserved")), hold_updates)


def _spent_before(connection: sa.Connection, budget: Budget, *, at: datetime) -> int:
    """Return the cost of the requests settled in the current period. No hour is in two periods."""
    c = hours_table.c
    query = sa.select(sa.func.coalesce(sa.func.sum(c.cost_nanos), 0)).where(c.tenant_id == budget.tenant)
    if budget.scope == "project":
        query = query.where(c.project == budget.subject)
    elif budget.scope == "key":
        query = query.where(c.key_id == budget.subject)
    hour = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if budget.period == "day":
        query = query.where(c.hour >= hour.replace(hour=0))
    elif budget.period == "month":
        query = query.where(c.hour >= hour.replace(day=1, hour=0))
    return int(connection.execute(query).scalar_one())


def _reset_unreached(connection: sa.Connection, budget: Budget, *, at: datetime) -> None:
    c = spend_table.c
    current_period = (c.budget_id == budget.id, c.period == budget.period_at(at))
    spent_nanos = connection.execute(sa.select(c.spent_nanos).where(*current_period)).scalar()
    reached_pct = budget.reached_pct(spent_nanos or 0)
    update = spend_table.update().where(*current_period, c.notified_pct > reached_pct)
    connection.execute(update.values(notified_pct=reached_pct))


def _usage(connection: sa.Connection, budgets: Sequence[Budget], *, at: datetime) -> list[BudgetUsage]:
    c = spend_table.c
    query = sa.select(spend_table).where(
        c.budget_id.in_([budget.id for budget in budgets]),
        c.period.in_({budget.period_at(at) for budget in budgets}),
    )
    spend = {(row.budget_id, row.period): row for row in connection.execute(query)}
    currencies = {tenant: currency_of(connection, tenant) for tenant in {b.tenant for b in budgets}}
    usages = []
    for budget in budgets:
        span = budget.period_at(at)
        row = spend.get((budget.id, span))
        spent_nanos, held_nanos = (row.spent_nanos, row.held_nanos) if row else (0, 0)
        currency = currencies[budget.tenant]
        usages.append(BudgetUsage(budget, span, spent_nanos, held_nanos, currency))
    return usages


def _get(connection: sa.Connection, tenant: str, budget_id: str) -> Budget:
    c = budgets_table.c
    query = sa.select(budgets_table).where(c.id == budget_id, c.tenant_id == tenant)
    row = connection.execute(query).first()
    if row is None:
        raise UnknownRecord(f"The tenant '{tenant}' has no budget '{budget_id}'.")
    return budget_of(row)


def _row(budget: Budget) -> dict[str, Any]:
    return {
        "id": budget.id,
        "tenant_id": budget.tenant,
        "scope": budget.scope,
        "subject": budget.subject,
        "period": budget.period,
        "limit_nanos": budget.limit_nanos,
        "hard": budget.hard,
        "notify_pcts": ",".join(str(pct) for pct in budget.notify_pcts),
        "webhook_url": budget.webhook_url,
        "created_at": budget.created_at,
        "retired_at": budget.retired_at,
    }


def _audit_details(budget: Budget) -> dict[str, Any]:
    """Return details for the audit log. Of a webhook's URL only the host: the rest may be secret."""
    return {
        "limit_nanos": budget.limit_nanos,
        "hard": budget.hard,
        "notify_pcts": list(budget.notify_pcts),
        "webhook_url": urlsplit(budget.webhook_url).hostname if budget.webhook_url else None,
    }
