"""Sums usage by the hour and by engine process, in the same transactions that settle.

A sum is therefore never behind its events, and a report need not read ten million events. `rollup_drift`
compares the sums with the events. `rebuild` recomputes them from the events.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.metering.events import FailedAttempt, UsageEvent, usage_table
from serve.storage.database import Store, UtcDateTime, metadata
from serve.tenants.audit import record

hours_table = sa.Table(
    "usage_hours",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("hour", UtcDateTime, primary_key=True),
    sa.Column("period", sa.String(7), primary_key=True),
    sa.Column("project", sa.String(63), primary_key=True),  # empty: none
    sa.Column("key_id", sa.String(32), primary_key=True),
    sa.Column("model", sa.String(160), primary_key=True),
    sa.Column("adapter", sa.Boolean, primary_key=True),
    sa.Column("plan_id", sa.Integer, primary_key=True),
    sa.Column("tier", sa.String(8), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("cached_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("cold_loads", sa.BigInteger, nullable=False),
    sa.Column("cost_nanos", sa.BigInteger, nullable=False),
    sa.Index("ix_usage_hours_hour", "hour"),
    sa.Index("ix_usage_hours_tenant_id_period", "tenant_id", "period"),
    sqlite_with_rowid=False,  # rows in the order of their key: a tenant's month is read in one go
)

engines_table = sa.Table(
    "engine_totals",
    metadata,
    sa.Column("replica", sa.String(64), primary_key=True),
    sa.Column("boot", sa.String(32), primary_key=True),
    sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
    sa.Column("completion_tokens", sa.BigInteger, nullable=False),
    sa.Column("updated_at", UtcDateTime, nullable=False),
)

SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cold_loads", "cost_nanos")

TOTALS = ("prompt_tokens", "completion_tokens")


def _upsert(table: sa.Table, added: Sequence[str], replaced: Sequence[str] = ()) -> sa.TextClause:
    """Build INSERT … ON CONFLICT for all columns.

    It is text because SQLAlchemy would compile its own statement at each use, which took half of a
    settlement's time.
    """
    names = [column.name for column in table.columns]
    keys = ", ".join(column.name for column in table.primary_key)
    changes = [f"{name} = {table.name}.{name} + excluded.{name}" for name in added]
    changes += [f"{name} = excluded.{name}" for name in replaced]
    return sa.text(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)}) "
        f"ON CONFLICT ({keys}) DO UPDATE SET {', '.join(changes)}"
    ).bindparams(*(sa.bindparam(column.name, type_=column.type) for column in table.columns))


_ADD_HOURS = _upsert(hours_table, SUMS)
_ADD_ENGINES = _upsert(engines_table, TOTALS, ("updated_at",))


def add(
    connection: sa.Connection,
    events: Iterable[tuple[UsageEvent, str]],
    failed: Iterable[FailedAttempt] = (),
    *,
    at: datetime,
) -> None:
    """Add `events`, each with its billing period, in the caller's transaction.

    `failed` attempts add only to the engines' totals, so that those agree with the engines' own counters.
    """
    hours: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(SUMS))
    engines: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for event, period in events:
        t, hour = event.tokens, event.created_at.replace(minute=0, second=0, microsecond=0)
        tenant_key = (event.tenant, hour, period, event.project or "", event.key_id)
        model_key = (event.model, event.adapter_version is not None, event.plan_id, event.tier)
        counts = (1, t.prompt, t.cached, t.completion, event.cold_loads, event.cost_nanos)
        _increase(hours[tenant_key + model_key], counts)
        # The engine reads the prompt once per sample.
        _increase(engines[event.replica, event.boot], (t.prompt * event.samples, t.completion))
    for attempt in failed:
        read = (attempt.prompt_tokens, attempt.completion_tokens)
        if attempt.replica is not None and attempt.boot is not None and any(read):
            _increase(engines[attempt.replica, attempt.boot], read)
    keys = [column.name for column in hours_table.primary_key]
    # Sorted by key, so that two gateways that add to the same rows cannot deadlock.
    rows = [
        dict(zip(keys, key, strict=True)) | dict(zip(SUMS, sums, strict=True))
        for key, sums in sorted(hours.items())
    ]
    if rows:
        connection.execute(_ADD_HOURS, rows)
    rows = [
        {"replica": replica, "boot": boot, "updated_at": at} | dict(zip(TOTALS, sums, strict=True))
        for (replica, boot), sums in sorted(engines.items())
    ]
    if rows:
        connection.execute(_ADD_ENGINES, rows)


def rollup_drift(store: Store, day: date) -> int:
    """Return the number of rows in which the hours of `day` (UTC) differ from its events. 0 is correct."""
    with store.read() as connection:
        stored = _rows(connection, sa.select(hours_table).where(*_in_day(hours_table.c.hour, day)))
        expected = _rows(connection, _from_events(connection, day))
    return len(stored ^ expected)


def rebuild(store: Store, day: date, *, actor: str, at: datetime) -> int:
    """Recompute the hours of `day` (UTC) from its events. Return the number of rows that were wrong."""
    with store.write() as connection:
        if connection.dialect.name != "sqlite":
            # Settlements must wait: one whose event is not visible here could add to a deleted row.
            connection.execute(sa.text("LOCK TABLE usage_hours IN SHARE ROW EXCLUSIVE MODE"))
        on_day = _in_day(hours_table.c.hour, day)
        stored = _rows(connection, sa.select(hours_table).where(*on_day))
        expected = _rows(connection, _from_events(connection, day))
        wrong = len(stored ^ expected)
        connection.execute(hours_table.delete().where(*on_day))
        names = [column.name for column in hours_table.columns]
        if expected:
            rows = [dict(zip(names, row, strict=True)) for row in expected]
            connection.execute(hours_table.insert(), rows)
        details = {"rows": len(expected), "wrong": wrong}
        record(connection, "usage.rebuild", f"{day}", details, actor=actor, at=at)
    return wrong


def _in_day(at: "sa.ColumnElement[datetime]", day: date) -> "tuple[sa.ColumnElement[bool], ...]":
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return at >= start, at < start + timedelta(days=1)


def _rows(connection: sa.Connection, query: "sa.Select[Any]") -> set[tuple[Any, ...]]:
    """Return the query's rows in the form of `hours_table`."""
    split = len(hours_table.columns) - len(SUMS)
    return {
        (*row[:split], *(int(count) for count in row[split:])) for row in connection.execute(query).tuples()
    }


def _from_events(connection: sa.Connection, day: date) -> "sa.Select[Any]":
    """Compute `hours_table`'s columns, in their order, from the events of `day`."""
    c = usage_table.c
    # As text where the store keeps times as text, so that comparisons and results stay the same.
    hour: sa.ColumnElement[Any]
    if connection.dialect.name == "sqlite":
        hour = sa.func.strftime(sa.literal_column("'%Y-%m-%d %H:00:00.000000'"), c.created_at)
    else:
        hour = sa.func.date_trunc(sa.literal_column("'hour'"), c.created_at, sa.literal_column("'UTC'"))
    keys = (
        c.tenant_id,
        sa.type_coerce(hour, UtcDateTime),
        c.period,
        sa.func.coalesce(c.project, sa.literal_column("''")),
        c.key_id,
        c.model,
        c.adapter_version.is_not(None),
        c.plan_id,
        c.tier,
    )
    counts = (sa.func.count(), *(sa.func.sum(c[name]) for name in SUMS[1:]))
    # All tenants, so that the index that begins with the tenant can be used.
    tenants = sa.select(sa.table("accounts", sa.column("tenant_id")).c.tenant_id)
    within = (c.tenant_id.in_(tenants), *_in_day(c.created_at, day))
    return sa.select(*keys, *counts).where(*within).group_by(*keys)


def _increase(sums: list[int], counts: Iterable[int]) -> None:
    for position, count in enumerate(counts):
        sums[position] += count
