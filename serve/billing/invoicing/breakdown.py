"""Breaks an invoice down by day and key, and lists the requests behind its lines with their prices."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

import sqlalchemy as sa

from serve.billing.credits.charges import charges_table
from serve.billing.invoicing.document import InvoiceLine
from serve.billing.invoicing.periods import period_bounds
from serve.billing.invoicing.store import Invoice
from serve.billing.metering.events import usage_table
from serve.billing.metering.rollups import hours_table
from serve.billing.pricing.plans import Prices
from serve.errors import Conflict, InvalidRequest
from serve.storage.database import Store
from serve.storage.pagination import Page

By = Literal["day", "key"]


@dataclass(frozen=True, slots=True)
class UsageSum:
    """Sums requests of one group: a day ("2026-11-22") or a key's id. Costs are at list price, as charged."""

    group: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanos: int


@dataclass(frozen=True, slots=True)
class UsageRequest:
    """Lists one request or one charge. For a charge, `model` is its subject and `key_id` is empty."""

    id: str
    at: datetime
    key_id: str
    model: str
    tier: str
    price: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    cost_nanos: int
    status: str


@dataclass(frozen=True, slots=True)
class InvoiceFilter:
    """Selects part of an invoice: a line by its position from 1, a day (its midnight), a key."""

    line: int | None = None
    day: datetime | None = None
    key_id: str | None = None


class InvoiceUsage:
    """Queries the usage that invoices bill. Methods block, and raise Conflict for an unknown line."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def sums(self, invoice: Invoice, by: By, invoice_filter: InvoiceFilter | None = None) -> list[UsageSum]:
        """Return requests summed by day or key, from the hourly sums."""
        h, invoice_filter = hours_table.c, invoice_filter or InvoiceFilter()
        group = h.hour if by == "day" else h.key_id
        names = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_nanos")
        query = sa.select(group.label("the_group"), *(sa.func.sum(h[name]).label(name) for name in names))
        query = query.where(*_filters(hours_table, h.hour, invoice, invoice_filter)).group_by(group)
        sums: dict[str, list[int]] = defaultdict(lambda: [0] * len(names))
        with self._store.read() as connection:
            for row in connection.execute(query):
                key = f"{row.the_group:%Y-%m-%d}" if by == "day" else row.the_group
                for position, name in enumerate(names):
                    sums[key][position] += int(getattr(row, name))
        return [UsageSum(key, *counts) for key, counts in sorted(sums.items())]

    def requests(
        self,
        invoice: Invoice,
        invoice_filter: InvoiceFilter | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
    ) -> Page[UsageRequest]:
        """Return the requests, oldest first, behind the id `after`; on a line of charges, the charges.

        Raises InvalidRequest if `after` is none of them.
        """
        invoice_filter = invoice_filter or InvoiceFilter()
        line = _line(invoice, invoice_filter.line)
        table = charges_table if line is not None and line.kind != "usage" else usage_table
        c = table.c
        id_column = c.reference if table is charges_table else c.request_id
        where = _filters(table, c.created_at, invoice, invoice_filter)
        query = sa.select(table).where(*where)
        with self._store.read() as connection:
            if after is not None:
                position = sa.select(c.created_at, c.id).where(
                    id_column == after, c.tenant_id == invoice.document.tenant
                )
                cursor = connection.execute(position).first() if after.isprintable() else None
                if cursor is None:
                    message = "'after' is not the id of an item of this list."
                    raise InvalidRequest(message, "after", "invalid_value")
                tie = sa.and_(c.created_at == cursor.created_at, c.id > cursor.id)
                query = query.where(c.created_at >= cursor.created_at)
                query = query.where(sa.or_(c.created_at > cursor.created_at, tie))
            rows = connection.execute(query.order_by(c.created_at, c.id).limit(limit + 1)).all()
            labels = {id: version.label for id, version in Prices(self._store).by_id(connection).items()}
        build = _charge if table is charges_table else _request
        return Page([build(row, labels) for row in rows[:limit]], len(rows) > limit)


def _line(invoice: Invoice, position: int | None) -> InvoiceLine | None:
    lines = invoice.document.lines
    if position is None:
        return None
    if not 1 <= position <= len(lines):
        raise Conflict(f"There is no line {position}: there are {len(lines)}.")
    return lines[position - 1]


def _filters(
    table: sa.Table, time_column: sa.ColumnElement[datetime], invoice: Invoice, invoice_filter: InvoiceFilter
) -> Sequence[sa.ColumnElement[bool]]:
    c, document = table.c, invoice.document
    where = [c.tenant_id == document.tenant, c.period == document.period]
    if invoice_filter.day is not None:
        where += [time_column >= invoice_filter.day, time_column < invoice_filter.day + timedelta(days=1)]
    if invoice_filter.key_id is not None:
        where.append(c.key_id == invoice_filter.key_id if "key_id" in c else sa.false())
    line = _line(invoice, invoice_filter.line)
    if line is None:
        return where
    if line.kind == "minimum" or (line.kind == "usage") == (table is charges_table):
        return [sa.false()]
    start, _ = period_bounds(document.period)
    begin, end = (start, None) if line.late is None else period_bounds(line.late)
    where.append(time_column >= begin)
    if end is not None:
        where.append(time_column < end)
    where.append(c.plan_id == line.plan_id)
    if table is charges_table:
        return [*where, c.kind == line.kind, c.subject == line.model]
    adapter = c.adapter if "adapter" in c else c.adapter_version.is_not(None)
    return [*where, c.model == line.model, c.tier == line.tier, adapter if line.adapter else ~adapter]


def _request(row: sa.Row[Any], labels: dict[int, str]) -> UsageRequest:
    return UsageRequest(
        row.request_id,
        row.created_at,
        row.key_id,
        row.model,
        row.tier,
        labels[row.plan_id],
        row.prompt_tokens,
        row.cached_tokens,
        row.completion_tokens,
        row.cost_nanos,
        row.status,
    )


def _charge(row: sa.Row[Any], labels: dict[int, str]) -> UsageRequest:
    quantity = f"{row.quantity} {'trained tokens' if row.kind == 'training' else 'adapter-hours'}"
    return UsageRequest(
        row.reference,
        row.created_at,
        "",
        row.subject,
        "default",
        labels[row.plan_id],
        0,
        0,
        0,
        row.amount_nanos,
        quantity,
    )
