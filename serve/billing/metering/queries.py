"""Usage as it is read: sums over time, by whom and for what.

Whole hours come from `usage_hours`, which is never behind; what is left of an hour at either end, and
buckets of a minute, come from the events themselves, by their index. So an answer is exact for any two
moments, and its price does not grow with what was used before them.

What was charged, day by day: usage and what is billed besides requests, at list price.

Tiers, quotas, minimums, tax and credits belong to a whole month; they are on its invoice.
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
from serve.billing.pricing.plans import Tokens
from serve.errors import InvalidRequest
from serve.storage.database import Store

MINUTE, HOUR, DAY = timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)
# How much of a time as text names the bucket that it is in: for SQLite its length, for PostgreSQL its format.
_TEXT = {MINUTE: (16, "YYYY-MM-DD HH24:MI"), HOUR: (13, "YYYY-MM-DD HH24"), DAY: (10, "YYYY-MM-DD")}
DIMENSIONS = ("tenant", "project", "key", "model", "tier")
EVER = (datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC))

Names = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What was used in start ≤ t < end, in buckets of `width`: days, hours or minutes of UTC. None: in one.

    Empty filters let everything through; `by` names what to tell apart.
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
    """What one group used in one bucket. None: not asked to be told apart; for the project also: in none."""

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


class UsageQueries:
    """Questions about the usage of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def query(self, question: UsageQuery) -> list[UsageBucket]:
        """The groups that used something, by bucket and then by name.

        Raises InvalidRequest if they are more than the question's `groups_max`.
        """
        names = [name for name in DIMENSIONS if name in question.by]
        if question.width is None:
            sums = [((None, *group), counts) for group, counts in self._sums(question, names)]
        else:
            sums = self._sums(question, ["bucket", *names])
        return [
            UsageBucket(
                question.start if bucket is None else datetime.fromisoformat(bucket).replace(tzinfo=UTC),
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
        """Totals by tenant, model, price version and tier over start ≤ created_at < end."""
        tenants = () if tenant is None else (tenant,)
        question = UsageQuery(start or EVER[0], end or EVER[1], tenants=tenants)
        sums = self._sums(question, ["tenant", "model", "adapter", "plan", "tier"])
        totals = [
            UsageTotal(who, model, adapter, plan, requests, Tokens(prompt, cached, completion), cost, tier)
            for (who, model, adapter, plan, tier), (requests, prompt, cached, completion, _, cost) in sums
        ]
        return sorted(totals, key=lambda t: (t.tenant, t.model, t.plan_id, t.tier != "default"))

    def by_engine(self) -> dict[tuple[str, str], EngineTotal]:
        """Totals per (replica, boot), prompts counted once per sample as the engine counts them."""
        c = engines_table.c
        query = sa.select(c.replica, c.boot, c.prompt_tokens, c.completion_tokens)
        with self._store.read() as connection:
            return {(row.replica, row.boot): EngineTotal(*row) for row in connection.execute(query)}

    def _sums(self, question: UsageQuery, names: Sequence[str]) -> list[tuple[tuple[Any, ...], list[int]]]:
        """The SUMS of each group of `names` that is there, in the order of the groups."""
        sums: dict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0] * len(SUMS))
        limit = None if question.groups_max is None else question.groups_max + 1
        with self._store.read() as connection:
            width = question.width or DAY
            for table, start, end in parts(question.start, question.end, width):
                columns = _columns(connection, table, width)
                groups = [columns[name] for name in names]
                query = sa.select(*groups, *_counts(table)).group_by(*groups).limit(limit)
                for row in connection.execute(query.where(*_within(table, question, start, end))):
                    if row[-1] is None:
                        continue  # without groups SQL sums up no rows, too
                    found = sums[tuple(row[: len(names)])]
                    for position, count in enumerate(row[len(names) :]):
                        found[position] += int(count)
                if limit is not None and len(sums) >= limit:
                    raise InvalidRequest(
                        f"The answer has more than {limit - 1} groups: ask for less time, or group by less.",
                        "group_by",
                        "invalid_value",
                    )
        return sorted(sums.items(), key=lambda item: tuple("" if part is None else part for part in item[0]))


def floor(at: datetime, width: timedelta) -> datetime:
    """The start, in UTC, of the day, hour or minute that `at` is in."""
    at = at.astimezone(UTC).replace(second=0, microsecond=0)
    if width >= HOUR:
        at = at.replace(minute=0)
    return at.replace(hour=0) if width >= DAY else at


def parts(start: datetime, end: datetime, width: timedelta) -> Iterator[tuple[sa.Table, datetime, datetime]]:
    """[start, end) in disjoint parts, each with the table that answers for it."""
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
    """The bucket that the time `at` is in, as text that sorts and that `datetime.fromisoformat` reads."""
    length, form = _TEXT[width]
    # Literals, not parameters: PostgreSQL must see that what is grouped by is what is selected.
    if connection.dialect.name == "sqlite":
        return sa.func.substr(at, sa.literal_column("1"), sa.literal_column(str(length)))
    utc = sa.func.timezone(sa.literal_column("'UTC'"), at)
    return sa.func.to_char(utc, sa.literal_column(f"'{form}'"))


def everyone() -> "sa.Select[tuple[str]]":
    """All tenants that have an account, so that indexes which begin with a tenant serve a search for all."""
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
    """SUMS over the rows of a group."""
    requests = sa.func.sum(table.c.requests) if table is hours_table else sa.func.count()
    return [requests, *(sa.func.sum(table.c[name]) for name in SUMS if name != "requests")]


def _within(
    table: sa.Table, question: UsageQuery, start: datetime, end: datetime
) -> Iterator["sa.ColumnElement[bool]"]:
    c = table.c
    at = c.hour if table is hours_table else c.created_at
    yield at >= start
    yield at < end
    yield c.tenant_id.in_(question.tenants or everyone())
    for column, wanted in (
        (c.project, question.projects),
        (c.key_id, question.keys),
        (c.model, question.models),
    ):
        if wanted:
            yield column.in_(wanted)
    if question.tier is not None:
        yield c.tier == question.tier


@dataclass(frozen=True, slots=True)
class CostBucket:
    """What one group was charged in one bucket. None: not asked to be told apart, or of none."""

    bucket: datetime
    nanos: int
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    line_item: str | None = None


class CostQueries:
    """Questions about the charges of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def query(self, question: UsageQuery, *, line_items: bool) -> list[CostBucket]:
        """The groups that were charged, by bucket and then by name.

        A line item is a model and tier, or a charge such as "training: acme/support@1". Charges have neither
        a project nor a key: a question about some of those leaves them out.
        """
        by = question.by & {"tenant", "project", "key"} | (
            frozenset({"model", "tier"}) if line_items else set()
        )
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for used in UsageQueries(self._store).query(replace(question, by=by)):
            item = label_of(used.model or "", used.tier or "default") if line_items else None
            sums[used.bucket, used.tenant, used.project, used.key, item] += used.cost_nanos
        if not (question.projects or question.keys or question.models or question.tier):
            for bucket, tenant, item, nanos in self._charges(question):
                who = tenant if "tenant" in by else None
                sums[bucket, who, None, None, item if line_items else None] += nanos
        in_order = sorted(sums.items(), key=lambda entry: tuple(str(part or "") for part in entry[0]))
        return [CostBucket(bucket, nanos, *group) for (bucket, *group), nanos in in_order]

    def _charges(self, question: UsageQuery) -> Iterator[tuple[datetime, str, str, int]]:
        c = charges_table.c
        with self._store.read() as connection:
            bucket = bucket_of(connection, c.created_at, question.width or DAY)
            groups = (bucket, c.tenant_id, c.kind, c.subject)
            query = (
                sa.select(*groups, sa.func.sum(c.amount_nanos))
                .group_by(*groups)
                .where(
                    c.created_at >= question.start,
                    c.created_at < question.end,
                    c.tenant_id.in_(question.tenants or everyone()),
                )
            )
            for text, tenant, kind, subject, nanos in connection.execute(query).all():
                at = datetime.fromisoformat(text).replace(tzinfo=UTC)
                yield at, tenant, f"{kind}: {subject}", int(nanos)
