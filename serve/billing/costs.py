"""What was charged, day by day: usage and what is billed besides requests, at list price.

Tiers, quotas, minimums, tax and credits belong to a whole month; they are on its invoice.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from serve.billing.charges import charges_table
from serve.billing.reports import DAY, Question, Usage, bucket_of, everyone
from serve.billing.usage import label_of
from serve.db import Store


@dataclass(frozen=True, slots=True)
class Cost:
    """What one group was charged in one bucket. None: not asked to be told apart, or of none."""

    bucket: datetime
    nanos: int
    tenant: str | None = None
    project: str | None = None
    key: str | None = None
    line_item: str | None = None


class Costs:
    """Questions about the charges of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ask(self, question: Question, *, line_items: bool) -> list[Cost]:
        """The groups that were charged, by bucket and then by name.

        A line item is a model and tier, or a charge such as "training: acme/support@1". Charges have neither
        a project nor a key: a question about some of those leaves them out.
        """
        by = question.by & {"tenant", "project", "key"} | (
            frozenset({"model", "tier"}) if line_items else set()
        )
        sums: dict[tuple[Any, ...], int] = defaultdict(int)
        for used in Usage(self._store).ask(replace(question, by=by)):
            item = label_of(used.model or "", used.tier or "default") if line_items else None
            sums[used.bucket, used.tenant, used.project, used.key, item] += used.cost_nanos
        if not (question.projects or question.keys or question.models or question.tier):
            for bucket, tenant, item, nanos in self._charges(question):
                who = tenant if "tenant" in by else None
                sums[bucket, who, None, None, item if line_items else None] += nanos
        in_order = sorted(sums.items(), key=lambda entry: tuple(str(part or "") for part in entry[0]))
        return [Cost(bucket, nanos, *group) for (bucket, *group), nanos in in_order]

    def _charges(self, question: Question) -> Iterator[tuple[datetime, str, str, int]]:
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
