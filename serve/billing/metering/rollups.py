"""Usage summed by the hour, and by engine process: kept in the very transactions that settle.

So a sum is never behind its events, and pages need not read ten million of them. `rollup_drift` compares
them with the events, and `rebuild` makes them anew from the events alone.
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


def _adding(table: sa.Table, added: Sequence[str], replaced: Sequence[str] = ()) -> sa.TextClause:
    """INSERT … ON CONFLICT, of all columns. As text, because SQLAlchemy would compile its own with each use:
    half of what a settlement took alone."""
    names = [column.name for column in table.columns]
    keys = ", ".join(column.name for column in table.primary_key)
    changes = [f"{name} = {table.name}.{name} + excluded.{name}" for name in added]
    changes += [f"{name} = excluded.{name}" for name in replaced]
    return sa.text(
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join(f':{name}' for name in names)}) "
        f"ON CONFLICT ({keys}) DO UPDATE SET {', '.join(changes)}"
    ).bindparams(*(sa.bindparam(column.name, type_=column.type) for column in table.columns))


_ADD_HOURS = _adding(hours_table, SUMS)
_ADD_ENGINES = _adding(engines_table, TOTALS, ("updated_at",))


def add(
    connection: sa.Connection,
    events: Iterable[tuple[UsageEvent, str]],
    failed: Iterable[FailedAttempt] = (),
    *,
    at: datetime,
) -> None:
    """Add `events`, each with its billing period, in the caller's transaction.

    Of `failed` attempts, only what the engine counted: its totals agree with the engine's own counters.
    """
    hours: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(SUMS))
    engines: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for event, period in events:
        t, hour = event.tokens, event.created_at.replace(minute=0, second=0, microsecond=0)
        who = (event.tenant, hour, period, event.project or "", event.key_id)
        what = (event.model, event.adapter_version is not None, event.plan_id, event.tier)
        counts = (1, t.prompt, t.cached, t.completion, event.cold_loads, event.cost_nanos)
        _increase(hours[who + what], counts)
        # The engine reads the prompt once per sample.
        _increase(engines[event.replica, event.boot], (t.prompt * event.samples, t.completion))
    for one in failed:
        if one.replica is not None and one.boot is not None and one.completion_tokens:
            _increase(engines[one.replica, one.boot], (one.prompt_tokens, one.completion_tokens))
    keys = [column.name for column in hours_table.primary_key]
    # In the order of their keys: two gateways that add to the same rows must not wait for each other.
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
    """In how many rows the hours of `day` (UTC) differ from what its events say. 0 is right."""
    with store.read() as connection:
        kept = _rows(connection, sa.select(hours_table).where(*_in_day(hours_table.c.hour, day)))
        said = _rows(connection, _from_events(connection, day))
    return len(kept ^ said)


def rebuild(store: Store, day: date, *, actor: str, at: datetime) -> int:
    """Make the hours of `day` (UTC) anew from its events, which are the truth. How many rows were wrong."""
    with store.write() as connection:
        if connection.dialect.name != "sqlite":
            # Settlements wait: else one whose event is not seen here could add to a row that is thrown away.
            connection.execute(sa.text("LOCK TABLE usage_hours IN SHARE ROW EXCLUSIVE MODE"))
        of_day = _in_day(hours_table.c.hour, day)
        kept = _rows(connection, sa.select(hours_table).where(*of_day))
        said = _rows(connection, _from_events(connection, day))
        wrong = len(kept ^ said)
        connection.execute(hours_table.delete().where(*of_day))
        names = [column.name for column in hours_table.columns]
        if said:
            rows = [dict(zip(names, row, strict=True)) for row in said]
            connection.execute(hours_table.insert(), rows)
        details = {"rows": len(said), "wrong": wrong}
        record(connection, "usage.rebuild", f"{day}", details, actor=actor, at=at)
    return wrong


def _in_day(at: "sa.ColumnElement[datetime]", day: date) -> "tuple[sa.ColumnElement[bool], ...]":
    start = datetime(day.year, day.month, day.day, tzinfo=UTC)
    return at >= start, at < start + timedelta(days=1)


def _rows(connection: sa.Connection, query: "sa.Select[Any]") -> set[tuple[Any, ...]]:
    """Rows like those of `hours_table`."""
    split = len(hours_table.columns) - len(SUMS)
    return {
        (*row[:split], *(int(count) for count in row[split:])) for row in connection.execute(query).tuples()
    }


def _from_events(connection: sa.Connection, day: date) -> "sa.Select[Any]":
    """What the events of `day` make of `hours_table`'s columns, in their order."""
    c = usage_table.c
    # As text where the store keeps times as text: what it compares and what Python reads stay the same.
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
    # All tenants, so that the index which begins with the tenant serves.
    tenants = sa.select(sa.table("accounts", sa.column("tenant_id")).c.tenant_id)
    within = (c.tenant_id.in_(tenants), *_in_day(c.created_at, day))
    return sa.select(*keys, *counts).where(*within).group_by(*keys)


def _increase(sums: list[int], counts: Iterable[int]) -> None:
    for position, count in enumerate(counts):
        sums[position] += count
