"""Does the ledger agree with itself? Every balance and sum, made again from rows that are only ever added.

The transfers say what credit, spending and holds must be; the events say what transfers and roll-ups must be.
All is read in one transaction, so it may run beside the gateways. It reads everything that ever was: minutes
for tens of millions of events. Of single days `rollup_drift` says the same at once.
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

DIFFERENCES_MAX = 100  # of one check; who has more has one cause

Sums = Mapping[tuple[Any, ...], int]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """`kept` is what the ledger keeps as a sum, `said` what its rows say it must be."""

    subject: str
    stored: int
    expected: int


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must be so; `compared` is how many sums were looked at."""

    name: str
    compared: int
    mismatches: tuple[Mismatch, ...]


def verify(store: Store) -> list[Check]:
    """All checks. The ledger agrees with itself if none has a difference. Raises StoreUnavailable."""
    with store.read() as connection:
        return [
            *_balances(connection),
            *_settlements(connection),
            _hours(connection),
            _engines(connection),
            *_budgets(connection),
        ]


def _balances(connection: sa.Connection) -> Iterator[Check]:
    """The trial balance: each transfer debits one account and credits another, so what is left must agree."""
    t, h = transfers_table.c, holds_table.c
    moved, steps = defaultdict[tuple[Any, ...], int](int), defaultdict[tuple[Any, ...], int](int)
    spent = defaultdict[tuple[Any, ...], int](int)
    query = sa.select(t.tenant_id, t.kind, sa.func.sum(t.amount_nanos), sa.func.count())
    for tenant, kind, nanos, count in connection.execute(query.group_by(t.tenant_id, t.kind)):
        if kind in ("hold", "settle", "void"):
            steps[(tenant,)] += int(count) if kind == "hold" else -int(count)
        if kind in ("settle", "charge"):
            spent[(tenant,)] += int(nanos)
        elif kind in ("grant", "payment", "refund"):
            moved[(tenant,)] += int(nanos)
        elif kind in ("withdraw", "expire"):
            moved[(tenant,)] -= int(nanos)
    a = accounts_table.c
    accounts = connection.execute(sa.select(a.tenant_id, a.credit_nanos, a.spent_nanos, a.held_nanos)).all()
    credit = {(tenant,): nanos for tenant, nanos, _, _ in accounts}
    yield _check("credit = granted + paid + refunded - withdrawn - expired", credit, moved)
    yield _check("spent = settled + charged", {(row[0],): row[2] for row in accounts}, spent)
    held = _sums(connection, sa.func.sum(h.amount_nanos), h.tenant_id)
    yield _check("held = open holds", {(row[0],): row[3] for row in accounts}, held)
    opened = _sums(connection, sa.func.count(), h.tenant_id)
    yield _check("open holds = holds not settled or voided", opened, steps)
    backwards = sa.or_(t.debit == t.credit, sa.and_(t.debit != t.tenant_id, t.credit != t.tenant_id))
    wrong = _sums(connection, sa.func.count(), t.tenant_id, where=backwards)
    yield _check("a transfer moves from one account to another, one of them the tenant's", wrong, {})


def _settlements(connection: sa.Connection) -> Iterator[Check]:
    """Each settlement has its event, of the same cost, and no event is without one."""
    t, e = transfers_table.c, usage_table.c
    settled = t.kind == "settle"
    counted = _sums(connection, sa.func.count(), t.tenant_id, where=settled)
    yield _check("settlements = usage events", counted, _sums(connection, sa.func.count(), e.tenant_id))
    pairs = transfers_table.outerjoin(usage_table, t.request_id == e.request_id)
    differ = sa.or_(e.id.is_(None), e.cost_nanos != t.amount_nanos, e.tenant_id != t.tenant_id)
    query = sa.select(t.request_id, t.amount_nanos, sa.func.coalesce(e.cost_nanos, -1)).select_from(pairs)
    found = connection.execute(query.where(settled, differ).limit(DIFFERENCES_MAX))
    wrong = tuple(Mismatch(request_id, kept, said) for request_id, kept, said in found)
    yield Check("a settlement's amount = its event's cost (-1: it has none)", sum(counted.values()), wrong)


def _hours(connection: sa.Connection) -> Check:
    kept: dict[tuple[Any, ...], int] = {}
    said: dict[tuple[Any, ...], int] = {}
    for table, sums in ((hours_table, kept), (usage_table, said)):
        c = table.c
        keys = (c.tenant_id, c.period, c.key_id, c.model, c.plan_id, c.tier)
        requests = sa.func.sum(c.requests) if table is hours_table else sa.func.count()
        counts = (requests, *(sa.func.sum(c[name]) for name in SUMS[1:]))
        for row in connection.execute(sa.select(*keys, *counts).group_by(*keys)):
            for name, count in zip(SUMS, row[len(keys) :], strict=True):
                sums[(*row[: len(keys)], name)] = int(count)
    return _check("hours = usage events", kept, said)


def _engines(connection: sa.Connection) -> Check:
    """What failed counts once the engine has made a token: prompts of others it may never have read."""
    n, e, f = engines_table.c, usage_table.c, attempts_table.c
    kept: dict[tuple[Any, ...], int] = {}
    said = defaultdict[tuple[Any, ...], int](int)
    for row in connection.execute(sa.select(n.replica, n.boot, n.prompt_tokens, n.completion_tokens)):
        kept[row.replica, row.boot, "prompt"] = row.prompt_tokens
        kept[row.replica, row.boot, "completion"] = row.completion_tokens
    events = sa.select(
        e.replica, e.boot, sa.func.sum(e.prompt_tokens * e.samples), sa.func.sum(e.completion_tokens)
    ).group_by(e.replica, e.boot)
    failed = (
        sa.select(f.replica, f.boot, sa.func.sum(f.prompt_tokens), sa.func.sum(f.completion_tokens))
        .where(f.replica.is_not(None), f.boot.is_not(None), f.completion_tokens > 0)
        .group_by(f.replica, f.boot)
    )
    for query in (events, failed):
        for replica, boot, prompt, completion in connection.execute(query):
            said[replica, boot, "prompt"] += int(prompt)
            said[replica, boot, "completion"] += int(completion)
    return _check("engines' totals = usage events + failed attempts", kept, said)


def _budgets(connection: sa.Connection) -> Iterator[Check]:
    """What budgets hold is what open holds remember; none has spent more than its subject was billed."""
    h, s, e = holds_table.c, spend_table.c, usage_table.c
    reserved = defaultdict[tuple[Any, ...], int](int)
    for text, nanos in connection.execute(sa.select(h.budgets, h.amount_nanos).where(h.budgets.is_not(None))):
        for place in json.loads(text):
            reserved[tuple(place)] += nanos
    spends = connection.execute(sa.select(s.budget_id, s.period, s.spent_nanos, s.held_nanos)).all()
    kept = {(budget_id, period): held for budget_id, period, _, held in spends}
    yield _check("budgets hold what open holds remember", kept, reserved)
    budgets = {row.id: budget_of(row) for row in connection.execute(sa.select(budgets_table))}
    over = []
    for budget_id, period, spent, _ in spends:
        budget = budgets[budget_id]
        column = {"tenant": e.tenant_id, "project": e.project, "key": e.key_id}[budget.scope]
        since = _start(period, PERIODS[budget.period])
        billed = sa.select(sa.func.coalesce(sa.func.sum(e.cost_nanos), 0)).where(
            e.tenant_id == budget.tenant, e.created_at >= since, column == budget.subject
        )
        said = int(connection.execute(billed).scalar_one())
        if spent > said:
            over.append(Mismatch(f"{budget_id} {period}", spent, said))
    yield Check("budgets spent no more than was billed", len(spends), tuple(over[:DIFFERENCES_MAX]))


def _start(period: str, form: str) -> datetime:
    if period == form:  # a name, not a time: it has no start
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


def _check(name: str, kept: Sums, said: Sums) -> Check:
    """What is in one of them only is 0 in the other."""
    subjects = sorted(kept.keys() | said.keys(), key=str)
    differences = (
        Mismatch(" ".join(str(part) for part in subject), kept.get(subject, 0), said.get(subject, 0))
        for subject in subjects
    )
    wrong = tuple(one for one in differences if one.stored != one.expected)
    return Check(name, len(subjects), wrong[:DIFFERENCES_MAX])
