"""Verifies the ledger: recomputes every balance and sum from append-only rows, and compares.

Credit, spending and holds must follow from the transfers. Transfers and roll-ups must follow from the usage
events. Everything is read in one transaction, so it may run beside the gateways. It reads all history, which
takes minutes for tens of millions of events. `rollup_drift` checks the roll-ups of a single day at once.
"""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from serve.billing.budgets.budgets import PERIODS, budget_of, budgets_table, spend_table
from serve.billing.ledger.accounts import accounts_table, holds_table, transfers_table
from serve.billing.metering.events import attempts_table, usage_table
from serve.billing.metering.rollups import SUMS, engines_table, hours_table
from serve.storage.database import Store

MISMATCHES_MAX = 100  # of one check; more of them usually have one cause

Sums = Mapping[tuple[Any, ...], int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Reports a difference: `stored` is the ledger's sum, `expected` the sum of its rows."""

    subject: str
    stored: int
    expected: int


@dataclass(frozen=True, slots=True)
class Check:
    """Reports one check. `compared` is the number of sums that were compared."""

    name: str
    compared: int
    mismatches: tuple[Mismatch, ...]


def verify(store: Store) -> list[Check]:
    """Run all checks. The ledger is consistent if none has a mismatch. Raises StoreUnavailable."""
    with store.read() as connection:
        return [
            *_balances(connection),
            *_settlements(connection),
            _hours(connection),
            _engines(connection),
            *_budgets(connection),
        ]


def _balances(connection: sa.Connection) -> Iterator[Check]:
    """Compute the trial balance: every account's balance must equal the sum of its transfers."""
    t, h = transfers_table.c, holds_table.c
    credited, hold_balance = defaultdict[tuple[Any, ...], int](int), defaultdict[tuple[Any, ...], int](int)
    spent = defaultdict[tuple[Any, ...], int](int)
    query = sa.select(t.tenant_id, t.kind, sa.func.sum(t.amount_nanos), sa.func.count())
    for tenant, kind, nanos, count in connection.execute(query.group_by(t.tenant_id, t.kind)):
        if kind in ("hold", "settle", "void"):
            hold_balance[(tenant,)] += int(count) if kind == "hold" else -int(count)
        if kind in ("settle", "charge"):
            spent[(tenant,)] += int(nanos)
        elif kind in ("grant", "payment", "refund"):
            credited[(tenant,)] += int(nanos)
        elif kind in ("withdraw", "expire"):
            credited[(tenant,)] -= int(nanos)
    a = accounts_table.c
    accounts = connection.execute(sa.select(a.tenant_id, a.credit_nanos, a.spent_nanos, a.held_nanos)).all()
    credit = {(tenant,): nanos for tenant, nanos, _, _ in accounts}
    yield _check("credit = granted + paid + refunded - withdrawn - expired", credit, credited)
    yield _check("spent = settled + charged", {(row[0],): row[2] for row in accounts}, spent)
    held = _sums(connection, sa.func.sum(h.amount_nanos), h.tenant_id)
    yield _check("held = open holds", {(row[0],): row[3] for row in accounts}, held)
    open_counts = _sums(connection, sa.func.count(), h.tenant_id)
    yield _check("open holds = holds not settled or voided", open_counts, hold_balance)
    is_malformed = sa.or_(t.debit == t.credit, sa.and_(t.debit != t.tenant_id, t.credit != t.tenant_id))
    malformed = _sums(connection, sa.func.count(), t.tenant_id, where=is_malformed)
    yield _check("a transfer moves from one account to another, one of them the tenant's", malformed, {})


def _settlements(connection: sa.Connection) -> Iterator[Check]:
    """Check that each settlement has an event of the same cost, and each event a settlement."""
    t, e = transfers_table.c, usage_table.c
    settled = t.kind == "settle"
    settlement_counts = _sums(connection, sa.func.count(), t.tenant_id, where=settled)
    yield _check(
        "settlements = usage events", settlement_counts, _sums(connection, sa.func.count(), e.tenant_id)
    )
    pairs = transfers_table.outerjoin(usage_table, t.request_id == e.request_id)
    differ = sa.or_(e.id.is_(None), e.cost_nanos != t.amount_nanos, e.tenant_id != t.tenant_id)
    query = sa.select(t.request_id, t.amount_nanos, sa.func.coalesce(e.cost_nanos, -1)).select_from(pairs)
    rows = connection.execute(query.where(settled, differ).limit(MISMATCHES_MAX))
    mismatches = tuple(Mismatch(request_id, stored, expected) for request_id, stored, expected in rows)
    yield Check(
        "a settlement's amount = its event's cost (-1: it has none)",
        sum(settlement_counts.values()),
        mismatches,
    )


def _hours(connection: sa.Connection) -> Check:
    stored: dict[tuple[Any, ...], int] = {}
    expected: dict[tuple[Any, ...], int] = {}
    for table, sums in ((hours_table, stored), (usage_table, expected)):
        c = table.c
        keys = (c.tenant_id, c.period, c.key_id, c.model, c.plan_id, c.tier)
        requests = sa.func.sum(c.requests) if table is hours_table else sa.func.count()
        counts = (requests, *(sa.func.sum(c[name]) for name in SUMS[1:]))
        for row in connection.execute(sa.select(*keys, *counts).group_by(*keys)):
            for name, count in zip(SUMS, row[len(keys) :], strict=True):
                sums[(*row[: len(keys)], name)] = int(count)
    return _check("hours = usage events", stored, expected)


def _engines(connection: sa.Connection) -> Check:
    """Check engines' totals: what is billed, and what the engine counted for failed attempts."""
    n, e, f = engines_table.c, usage_table.c, attempts_table.c
    stored: dict[tuple[Any, ...], int] = {}
    expected = defaultdict[tuple[Any, ...], int](int)
    for row in connection.execute(sa.select(n.replica, n.boot, n.prompt_tokens, n.completion_tokens)):
        stored[row.replica, row.boot, "prompt"] = row.prompt_tokens
        stored[row.replica, row.boot, "completion"] = row.completion_tokens
    events = sa.select(
        e.replica, e.boot, sa.func.sum(e.prompt_tokens * e.samples), sa.func.sum(e.completion_tokens)
    ).group_by(e.replica, e.boot)
    failed = (
        sa.select(f.replica, f.boot, sa.func.sum(f.prompt_tokens), sa.func.sum(f.completion_tokens))
        .where(f.replica.is_not(None), f.boot.is_not(None), f.prompt_tokens + f.completion_tokens > 0)
        .group_by(f.replica, f.boot)
    )
    for query in (events, failed):
        for replica, boot, prompt, completion in connection.execute(query):
            expected[replica, boot, "prompt"] += int(prompt)
            expected[replica, boot, "completion"] += int(completion)
    return _check("engines' totals = usage events + failed attempts", stored, expected)


def _budgets(connection: sa.Connection) -> Iterator[Check]:
    """Check that budgets hold what open holds reserved, and spent no more than their subject was billed."""
    h, s, e = holds_table.c, spend_table.c, usage_table.c
    reserved = defaultdict[tuple[Any, ...], int](int)
    for text, nanos in connection.execute(sa.select(h.budgets, h.amount_nanos).where(h.budgets.is_not(None))):
        for reservation in json.loads(text):
            reserved[tuple(reservation)] += nanos
    spends = connection.execute(sa.select(s.budget_id, s.period, s.spent_nanos, s.held_nanos)).all()
    stored = {(budget_id, period): held for budget_id, period, _, held in spends}
    yield _check("budgets hold what open holds remember", stored, reserved)
    budgets = {row.id: budget_of(row) for row in connection.execute(sa.select(budgets_table))}
    mismatches = []
    for budget_id, period, spent, _ in spends:
        budget = budgets[budget_id]
        column = {"tenant": e.tenant_id, "project": e.project, "key": e.key_id}[budget.scope]
        since = _start(period, PERIODS[budget.period])
        billed = sa.select(sa.func.coalesce(sa.func.sum(e.cost_nanos), 0)).where(
            e.tenant_id == budget.tenant, e.created_at >= since, column == budget.subject
        )
        billed_nanos = int(connection.execute(billed).scalar_one())
        if spent > billed_nanos:
            mismatches.append(Mismatch(f"{budget_id} {period}", spent, billed_nanos))
    yield Check("budgets spent no more than was billed", len(spends), tuple(mismatches[:MISMATCHES_MAX]))


def _start(period: str, form: str) -> datetime:
    if period == form:  # "total" is a name, not a time: it has no start
        return datetime(1970, 1, 1, tzinfo=UTC)
    return datetime.strptime(period, form).replace(tzinfo=UTC)


def _sums(
    connection: sa.Connection,
    counted: "sa.ColumnElement[Any]",
    by: "sa.ColumnElement[Any]",
    *,
    where: "sa.ColumnElement[bool] | None" = None,
) -> dict[tuple[Any, ...], int]:
    query = sa.select(by, counted).group_by(by)
    rows = connection.execute(query if where is None else query.where(where))
    return {(key,): int(count) for key, count in rows}


def _check(name: str, stored: Sums, expected: Sums) -> Check:
    """Compare sums by subject. A subject that only one side has counts 0 on the other."""
    subjects = sorted(stored.keys() | expected.keys(), key=str)
    compared = (
        Mismatch(" ".join(str(part) for part in subject), stored.get(subject, 0), expected.get(subject, 0))
        for subject in subjects
    )
    mismatches = tuple(mismatch for mismatch in compared if mismatch.stored != mismatch.expected)
    return Check(name, len(subjects), mismatches[:MISMATCHES_MAX])
