"""The budgets of one store: made, changed, retired and shown, each with what it has spent so far.

All that changes a budget takes its tenant's account first, as holds and settlements do. So a new one begins
with exactly what its subject has spent in the current period, and with what its open requests hold: nothing
falls in between.
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
from serve.billing.webhooks.delivery import check_url
from serve.errors import AlreadyExists, Conflict, InvalidRequest, UnknownRecord
from serve.storage.database import Store
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record

LIMIT_NANOS_MAX = 10**18
NOTIFY_PCTS = (50, 80, 100)
PCT_MAX, PCTS_MAX = 200, 8
PER_TENANT_MAX = 1000  # in force: each hold of the tenant looks at them

# Of tables that billing does not know: it only asks whether a subject is there.
_TENANTS = sa.table("tenants", sa.column("id"))
_SUBJECTS = {
    "project": sa.table("projects", sa.column("id"), sa.column("tenant_id")),
    "key": sa.table("api_keys", sa.column("id"), sa.column("tenant_id")),
}


@dataclass(frozen=True, slots=True)
class BudgetUsage:
    """A budget, and what is spent and held of it in the period `span` (2026-11-24, 2026-11, total)."""

    budget: Budget
    span: str
    spent_nanos: int
    held_nanos: int

    @property
    def left_nanos(self) -> int:
        return max(self.budget.limit_nanos - self.spent_nanos - self.held_nanos, 0)


class BudgetService:
    """Methods block. One that is given a tenant finds that tenant's budgets only."""

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
        """A budget of `subject` that binds from now on and counts what the current period has spent already.

        Raises UnknownRecord for an unknown tenant or subject (another tenant's is one), AlreadyExists if the
        subject has one for such a period, InvalidRequest for a value out of bounds, Conflict if there are
        too many.
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
            _require_room(connection, budget)
            connection.execute(budgets_table.insert(), _row(budget))
            _begin(connection, budget, at=at)
            said = {"level": scope, "subject": subject, "period": period} | _terms(budget)
            record(connection, "budget.create", budget.id, said, actor=actor, tenant=tenant, at=at)
            return _standings(connection, [budget], at=at)[0]

    def change(
        self, tenant: str, budget_id: str, changes: Mapping[str, Any], *, at: datetime, actor: str = SYSTEM
    ) -> BudgetUsage:
        """Change what `changes` names of limit_nanos, hard, notify_pcts and webhook_url.

        A threshold that is no longer reached, because the limit was raised, is told again when it is. Raises
        UnknownRecord, Conflict if it is retired, InvalidRequest for a value out of bounds.
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
            _forget_unreached(connection, changed, at=at)
            said = {name: value for name, value in _terms(changed).items() if name in changes}
            record(connection, "budget.change", budget_id, said, actor=actor, tenant=tenant, at=at)
            return _standings(connection, [changed], at=at)[0]

    def retire(self, tenant: str, budget_id: str, *, at: datetime, actor: str = SYSTEM) -> BudgetUsage:
        """Let it bind no longer, for good. What requests hold of it they give back. Raises UnknownRecord."""
        with self._store.write() as connection:
            lock_account(connection, tenant)
            budget = _get(connection, tenant, budget_id)
            if budget.retired_at is None:
                c = budgets_table.c
                connection.execute(budgets_table.update().where(c.id == budget_id).values(retired_at=at))
                record(connection, "budget.retire", budget_id, actor=actor, tenant=tenant, at=at)
            return _standings(connection, [_get(connection, tenant, budget_id)], at=at)[0]

    def get(self, tenant: str, budget_id: str, *, at: datetime) -> BudgetUsage:
        """Raises UnknownRecord, the same for another tenant's."""
        with self._store.read() as connection:
            return _standings(connection, [_get(connection, tenant, budget_id)], at=at)[0]

    def page(
        self, tenant: str, *, at: datetime, after: str | None = None, limit: int | None = None
    ) -> Page[BudgetUsage]:
        """Oldest first, retired ones too. Raises InvalidRequest if `after` is none of them."""
        with self._store.read() as connection:
            whose = budgets_table.c.tenant_id == tenant
            rows = page(connection, budgets_table, whose, after=after, limit=limit)
            found = [budget_of(row) for row in rows.items]
            return Page(_standings(connection, found, at=at), rows.has_more)


def _check(budget: Budget) -> None:
    """Raises InvalidRequest."""
    wrong = None
    if budget.scope not in SCOPES:
        wrong = ("level", f"must be one of {', '.join(SCOPES)}")
    elif budget.period not in PERIODS:
        wrong = ("period", f"must be one of {', '.join(PERIODS)}")
    elif not 0 <= budget.limit_nanos <= LIMIT_NANOS_MAX:
        wrong = ("limit_nanos", f"must be 0 to {LIMIT_NANOS_MAX}")
    elif len(budget.notify_pcts) > PCTS_MAX or not all(1 <= pct <= PCT_MAX for pct in budget.notify_pcts):
        wrong = ("notify_pcts", f"must be at most {PCTS_MAX} percentages from 1 to {PCT_MAX}")
    if wrong:
        raise InvalidRequest(f"'{wrong[0]}' {wrong[1]}.", wrong[0], "invalid_value")
    if budget.webhook_url is not None:
        check_url(budget.webhook_url)


def _require_subject(connection: sa.Connection, tenant: str, scope: str, subject: str) -> None:
    # Locked, so that of two who make the same budget for a tenant without an account one is second.
    there = sa.select(_TENANTS.c.id).where(_TENANTS.c.id == tenant).with_for_update(key_share=True)
    if connection.execute(there).first() is None:
        raise UnknownRecord(f"There is no tenant '{tenant}'.")
    if scope == "tenant":
        if subject != tenant:
            raise InvalidRequest("A tenant's budget is its own.", "level", "invalid_value")
        return
    c = _SUBJECTS[scope].c
    owned = sa.select(c.id).where(c.id == subject, c.tenant_id == tenant)
    if connection.execute(owned).first() is None:
        raise UnknownRecord(f"The tenant '{tenant}' has no {scope} '{subject}'.")


def _require_room(connection: sa.Connection, budget: Budget) -> None:
    c = budgets_table.c
    live = sa.select(sa.func.count()).where(c.tenant_id == budget.tenant, c.retired_at.is_(None))
    same = live.where(c.scope == budget.scope, c.subject == budget.subject, c.period == budget.period)
    if connection.execute(same).scalar_one():
        raise AlreadyExists(
            f"The {budget.scope} '{budget.subject}' has a budget for period '{budget.period}' already."
        )
    if connection.execute(live).scalar_one() >= PER_TENANT_MAX:
        raise Conflict(f"The tenant '{budget.tenant}' has {PER_TENANT_MAX} budgets; retire one first.")


def _begin(connection: sa.Connection, budget: Budget, *, at: datetime) -> None:
    """Write down what the current period has spent, and let the subject's open holds be the budget's, too."""
    held: dict[str, int] = defaultdict(int)
    held[budget.period_at(at)] = 0
    c = holds_table.c
    marks = []
    for row in connection.execute(sa.select(holds_table).where(c.tenant_id == budget.tenant)):
        terms = json.loads(row.sale) if row.sale else {}
        if budget.binds(row.tenant_id, terms.get("project"), terms.get("key_id")):
            span = budget.period_at(row.created_at)
            held[span] += row.amount_nanos
            reservations = [*json.loads(row.budgets or "[]"), (budget.id, span)]
            marks.append({"hold": row.request_id, "reserved": json.dumps(reservations)})
    spent = _spent_before(connection, budget, at=at)
    rows = [
        {
            "budget_id": budget.id,
            "period": span,
            "spent_nanos": spent if span == budget.period_at(at) else 0,
            "held_nanos": amount,
            "notified_pct": 0,
        }
        for span, amount in sorted(held.items())
    ]
    connection.execute(spend_table.insert(), rows)
    if marks:
        marking = holds_table.update().where(c.request_id == sa.bindparam("hold"))
        connection.execute(marking.values(budgets=sa.bindparam("reserved")), marks)


def _spent_before(connection: sa.Connection, budget: Budget, *, at: datetime) -> int:
    """What the requests cost that were settled in the current period. No hour is in two periods."""
    c = hours_table.c
    query = sa.select(sa.func.coalesce(sa.func.sum(c.cost_nanos), 0)).where(c.tenant_id == budget.tenant)
    if budget.scope == "project":
        query = query.where(c.project == budget.subject)
    elif budget.scope == "key":
        query = query.where(c.key_id == budget.subject)
    begins = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    if budget.period == "day":
        query = query.where(c.hour >= begins.replace(hour=0))
    elif budget.period == "month":
        query = query.where(c.hour >= begins.replace(day=1, hour=0))
    return int(connection.execute(query).scalar_one())


def _forget_unreached(connection: sa.Connection, budget: Budget, *, at: datetime) -> None:
    c = spend_table.c
    this = (c.budget_id == budget.id, c.period == budget.period_at(at))
    spent = connection.execute(sa.select(c.spent_nanos).where(*this)).scalar()
    reached = budget.reached_pct(spent or 0)
    lowering = spend_table.update().where(*this, c.notified_pct > reached)
    connection.execute(lowering.values(notified_pct=reached))


def _standings(connection: sa.Connection, found: Sequence[Budget], *, at: datetime) -> list[BudgetUsage]:
    c = spend_table.c
    query = sa.select(spend_table).where(
        c.budget_id.in_([budget.id for budget in found]),
        c.period.in_({budget.period_at(at) for budget in found}),
    )
    spend = {(row.budget_id, row.period): row for row in connection.execute(query)}
    standings = []
    for budget in found:
        span = budget.period_at(at)
        row = spend.get((budget.id, span))
        standings.append(
            BudgetUsage(budget, span, row.spent_nanos if row else 0, row.held_nanos if row else 0)
        )
    return standings


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


def _terms(budget: Budget) -> dict[str, Any]:
    """What the audit log says. Of a webhook's URL the host only: the rest may be a secret of its owner's."""
    return {
        "limit_nanos": budget.limit_nanos,
        "hard": budget.hard,
        "notify_pcts": list(budget.notify_pcts),
        "webhook_url": urlsplit(budget.webhook_url).hostname if budget.webhook_url else None,
    }
