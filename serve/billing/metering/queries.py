"""Queries usage and cost over time, grouped by tenant, project, key, model and tier.

Whole hours come from `usage_hours`, which is never behind the events. Parts of an hour at either end, and
buckets of a minute, come from the events by their index. The result is exact for any two times, and its
cost does not grow with the usage before them.

`UsageQueries` sums requests and tokens. `CostQueries` sums charges at list price: usage, and what is billed
besides requests. Tiers, included tokens, minimums, tax and credits apply to a whole month and appear only on
its invoice.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.ledger.accounts import accounts_table
from serve.billing.metering.events import EngineTotal, UsageTotal, label_of, usage_table
from serve.billing.metering.rollups import SUMS, engines_table, hours_table
from serve.billing.money import DEFAULT_CURRENCY
from serve.billing.pricing.currencies import plan_currencies
from serve.billing.pricing.plans import Tokens
from serve.errors import InvalidRequest
from serve.storage.database import Store

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
# The part of a time's text that names its bucket: a length for SQLite, a format for PostgreSQL.
_TEXT = {MINUTE: (16, "YYYY-MM-DD HH24:MI"), HOUR: (13, "YYYY-MM-DD HH24"), DAY: (10, "YYYY-MM-DD")}
DIMENSIONS = ("tenant", "project", "key", "model", "tier", "currency")
ALL_TIME = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Asks for usage in start ≤ t < end, in buckets of `width`: UTC days, hours or minutes, or None for one.

    Empty filters select everything. `by` names the dimensions to group by.
    """

    start: datetime
    end: datetime
    width: timedelta | None = DAY
    tenants: Names = ()
    projects: Names = ()
    keys: Names = ()
    models: Names = ()
    tier: str | None = None
    by: frozenset[str] = frozenset()
    groups_max: int | None = None


@dataclass(frozen=True, slots=True)
class UsageBucket:
    """Sums one group's usage in one bucket. A dimension is None if not grouped by, or for no project."""

    bucket: datetime
    requests: int
    tokens: Tokens
    cold_loads: int
    cost_nanos: int
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    model: str | None = None
    tier: str | None = None
    currency: str | None = None


class UsageQueries:
    """Queries the usage of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def query(self, usage_query: UsageQuery) -> list[UsageBucket]:
        """Return the groups with usage, by bucket and then by name.

        Raises InvalidRequest if there are more than the query's `groups_max`.
        """
        names = [name for name in DIMENSIONS if name in usage_query.by]
        if usage_query.width is None:
            sums = [((None, *group), counts) for group, counts in self._sums(usage_query, names)]
        else:
            sums = self._sums(usage_query, ["bucket", *names])
        return [
            UsageBucket(
                usage_query.start if bucket is None else datetime.fromisoformat(bucket).replace(tzinfo=UTC),
                requests,
                Tokens(prompt, cached, completion),
                cold_loads,
                cost,
                **dict(zip(names, group, strict=True)),
            )
            for (bucket, *group), (requests, prompt, cached, completion, cold_loads, cost) in sums
        ]

    def totals(
        self, *, tenant: str | None = None, start: datetime | None = None, end: datetime | None = None
    ) -> list[UsageTotal]:
        """Return totals by tenant, model, price version and tier over start ≤ created_at < end."""
        tenants = () if tenant is None else (tenant,)
        usage_query = UsageQuery(start or ALL_TIME[0], end or ALL_TIME[1], tenants=tenants)
        sums = self._sums(usage_query, ["tenant", "model", "adapter", "plan", "tier"])
        totals = [
            UsageTotal(
                tenant_id, model, adapter, plan, requests, Tokens(prompt, cached, completion), cost, tier
            )
            for (tenant_id, model, adapter, plan, tier), (
                requests,
                prompt,
                cached,
                completion,
                _,
                cost,
            ) in sums
        ]
        return sorted(totals, key=lambda t: (t.tenant, t.model, t.plan_id, t.tier != "default"))

    def by_engine(self) -> dict[tuple[str, str], EngineTotal]:
        """Return totals per (replica, boot). Prompts count once per sample, as in the engine."""
        c = engines_table.c
        query = sa.select(c.replica, c.boot, c.prompt_tokens, c.completion_tokens)
        with self._store.read() as connection:
            return {(row.replica, row.boot): EngineTotal(*row) for row in connection.execute(query)}

    def _sums(self, usage_query: UsageQuery, names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[int]]]:
        """Return the SUMS of each group of `names` that has usage, in the order of the groups."""
        sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(SUMS))
        limit = None if usage_query.groups_max is None else usage_query.groups_max + 1
        with self._store.read() as connection:
            width = usage_query.width or DAY
            for table, start, end in split_by_table(usage_query.start, usage_query.end, width):
                columns = _columns(connection, table, width)
                if "currency" in names:
                    columns["currency"] = currency_column(connection, table.c.plan_id)
                groups = [columns[name] for name in names]
                query = sa.select(*groups, *_counts(table)).group_by(*groups).limit(limit)
                for row in connection.execute(query.where(*_within(table, usage_query, start, end))):
                    if row[-1] is None:
                        continue  # without groups SQL returns a row even for no usage
                    group_sums = sums[tuple(row[: len(names)])]
                    for position, count in enumerate(row[len(names) :]):
                        group_sums[position] += int(count)
                if limit is not None and len(sums) >= limit:
                    raise InvalidRequest(
                        f"The answer has more than {limit - 1} groups: ask for less time, or group by less.",
                        "group_by",
                        "invalid_value",
                    )
        return sorted(sums.items(), key=lambda item: tuple("" if part is None else part for part in item[0]))


def floor(at: datetime, width: timedelta) -> datetime:
    """Return the start, in UTC, of the day, hour or minute that contains `at`."""
    at = at.astimezone(UTC).replace(second=0, microsecond=0)
    if width >= HOUR:
        at = at.replace(minute=0)
    return at.replace(hour=0) if width >= DAY else at


def split_by_table(
    start: datetime, end: datetime, width: timedelta
) -> Iterator[tuple[sa.Table, datetime, datetime]]:
    """Split [start, end) into disjoint parts, each with the table to read it from."""
    first, last = floor(start, HOUR), floor(end, HOUR)
    if first < start:
        first += HOUR
    if width < HOUR or first >= last:
        yield usage_table, start, end
        return
    if start < first:
        yield usage_table, start, first
    yield hours_table, first, last
    if last < end:
        yield usage_table, last, end


def bucket_of(connection: sa.Connection, at: "sa.ColumnElement[Any]", width: timedelta) -> Any:
    """Return the bucket that contains `at`, as sortable text that `datetime.fromisoformat` reads."""
    length, form = _TEXT[width]
    # Literals, not parameters: PostgreSQL must see that GROUP BY and SELECT have the same expression.
    if connection.dialect.name == "sqlite":
        return sa.func.substr(at, sa.literal_column("1"), sa.literal_column(str(length)))
    utc = sa.func.timezone(sa.literal_column("'UTC'"), at)
    return sa.func.to_char(utc, sa.literal_column(f"'{form}'"))


def currency_column(connection: sa.Connection, plan_id: "sa.ColumnElement[Any]") -> Any:
    """Return the currency of a row's price version, as a literal for the reason above."""
    cases = [
        (
            plan_id.in_([sa.literal_column(str(id)) for id in ids]),
            sa.literal_column(f"'{currency}'", sa.String),
        )
        for currency, ids in sorted(plan_currencies(connection).items())
    ]
    return sa.case(*cases) if cases else sa.literal_column(f"'{DEFAULT_CURRENCY}'", sa.String)


def all_tenants() -> "sa.Select[tuple[str]]":
    """Select all tenants with an account, so that indexes that begin with the tenant can be used."""
    return sa.select(accounts_table.c.tenant_id)


def _columns(connection: sa.Connection, table: sa.Table, width: timedelta) -> dict[str, Any]:
    c, hourly = table.c, table is hours_table
    return {
        "bucket": bucket_of(connection, c.hour if hourly else c.created_at, width),
        "tenant": c.tenant_id,
        "project": sa.func.nullif(c.project, sa.literal_column("''")),
        "key": c.key_id,
        "model": c.model,
        "adapter": c.adapter if hourly else c.adapter_version.is_not(None),
        "plan": c.plan_id,
        "tier": c.tier,
    }


def _counts(table: sa.Table) -> list[Any]:
    """Return the SUMS of a group's rows as SQL expressions."""
    requests = sa.func.sum(table.c.requests) if table is hours_table else sa.func.count()
    return [requests, *(sa.func.sum(table.c[name]) for name in SUMS if name != "requests")]


def _within(
    table: sa.Table, usage_query: UsageQuery, start: datetime, end: datetime
) -> Iterator["sa.ColumnElement[bool]"]:
    c = table.c
    at = c.hour if table is hours_table else c.created_at
    yield at >= start
    yield at < end
    yield c.tenant_id.in_(usage_query.tenants or all_tenants())
    for column, values in (
        (c.project, usage_query.projects),
        (c.key_id, usage_query.keys),
        (c.model, usage_query.models),
    ):
        if values:
            yield column.in_(values)
    if usage_query.tier is not None:
        yield c.tier == usage_query.tier


@dataclass(frozen=True, slots=True)
class CostBucket:
    """Sums one group's charges of one currency in one bucket.

    A dimension is None if not grouped by, or if there is none.
    """

    bucket: datetime
    nanos: int
    currency: str
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    line_item: str | None = None


class CostQueries:
    """Queries the charges of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def query(self, usage_query: UsageQuery, *, line_items: bool) -> list[CostBucket]:
        """Return the groups that were charged, by bucket and then by name.

        A line item is a model and tier, or a charge such as "training: acme/support@1". Charges have no
        project, key, model or tier: a query that filters by one of those leaves them out.
        """
        by = (
            usage_query.by & {"tenant", "project", "key"}
            | {"currency"}
            | (frozenset({"model", "tier"}) if line_items else set())
        )
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for bucket_usage in UsageQueries(self._store).query(replace(usage_query, by=by)):
            item = label_of(bucket_usage.model or "", bucket_usage.tier or "default") if line_items else None
            group = (bucket_usage.tenant, bucket_usage.project, bucket_usage.key, item)
            sums[bucket_usage.bucket, bucket_usage.currency, *group] += bucket_usage.cost_nanos
        if not (usage_query.projects or usage_query.keys or usage_query.models or usage_query.tier):
            for bucket, currency, tenant, item, nanos in self._charges(usage_query):
                tenant_key = tenant if "tenant" in by else None
                sums[bucket, currency, tenant_key, None, None, item if line_items else None] += nanos
        in_order = sorted(sums.items(), key=lambda entry: tuple(str(part or "") for part in entry[0]))
        return [CostBucket(bucket, nanos, *group) for (bucket, *group), nanos in in_order]

    def _charges(self, usage_query: UsageQuery) -> Iterator[tuple[datetime, str, str, str, int]]:
        c = charges_table.c
        with self._store.read() as connection:
            bucket = bucket_of(connection, c.created_at, usage_query.width or DAY)
            currency = currency_column(connection, c.plan_id)
            groups = (bucket, currency, c.tenant_id, c.kind, c.subject)
            query = (
                sa.select(*groups, sa.func.sum(c.amount_nanos))
                .group_by(*groups)
                .where(
                    c.created_at >= usage_query.start,
                    c.created_at < usage_query.end,
                    c.tenant_id.in_(usage_query.tenants or all_tenants()),
                )
            )
            for text, code, tenant, kind, subject, nanos in connection.execute(query).all():
                at = datetime.fromisoformat(text).replace(tzinfo=UTC)
                yield at, code, tenant, f"{kind}: {subject}", int(nanos)
