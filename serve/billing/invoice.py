"""Invoices: a month of one tenant's usage events, summed by model, price and tier.

An invoice is computed from the events alone, so running a month again gives the same lines to the
nano. Each run that differs from the one before is a new revision; revisions are never changed.
"""

import calendar
import re
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict

from serve.billing.pricing import Prices, PriceVersion
from serve.billing.usage import Usage, UsageTotal, label_of
from serve.db import Store, UtcDateTime, metadata
from serve.errors import OperatorError, UnknownRecord

invoices_table = sa.Table(
    "invoices",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("period", sa.String(7), nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),
    sa.Column("total_nanos", sa.BigInteger, nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("tenant_id", "period", "revision"),
)


class InvoiceLine(BaseModel):
    """One model and tier under one price version. `amount_nanos` is the sum of the events' own costs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    price: str
    requests: int
    uncached_prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    prompt_nanos_per_mtok: int
    cached_prompt_nanos_per_mtok: int
    completion_nanos_per_mtok: int
    amount_nanos: int
    tier: str = "default"

    @property
    def label(self) -> str:
        return label_of(self.model, self.tier)


class InvoiceDocument(BaseModel):
    """What is billed. Two documents are equal if and only if they bill the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str
    period: str
    currency: str
    lines: tuple[InvoiceLine, ...]

    @property
    def total_nanos(self) -> int:
        return sum(line.amount_nanos for line in self.lines)


@dataclass(frozen=True, slots=True)
class Invoice:
    document: InvoiceDocument
    revision: int
    created_at: datetime

    @property
    def number(self) -> str:
        return f"{self.document.tenant}-{self.document.period}-r{self.revision}"

    @property
    def is_draft(self) -> bool:
        """Made before its period was over, so more usage can follow."""
        return self.created_at < period_bounds(self.document.period)[1]


class Invoices:
    """The invoices of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._usage = Usage(store)
        self._prices = Prices(store)

    def create(self, tenant: str, period: str, *, at: datetime) -> Invoice:
        """The invoice of `tenant` for the month `period` ("2026-11"); unchanged usage, same revision.

        Raises OperatorError for a malformed period, UnknownRecord for an unknown tenant.
        """
        start, end = period_bounds(period)
        versions = {version.id: version for version in self._prices.versions()}
        totals = self._usage.totals(tenant=tenant, start=start, end=end)
        lines = tuple(_line(total, versions[total.plan_id]) for total in totals)
        document = InvoiceDocument(tenant=tenant, period=period, currency="USD", lines=lines)
        c = invoices_table.c
        newest = sa.select(invoices_table).where(c.tenant_id == tenant, c.period == period)
        try:
            with self._store.write() as connection:
                row = connection.execute(newest.order_by(c.revision.desc()).limit(1)).first()
                if row is not None and InvoiceDocument.model_validate_json(row.document) == document:
                    return Invoice(document, row.revision, row.created_at)
                revision = row.revision + 1 if row else 1
                connection.execute(
                    invoices_table.insert().values(
                        tenant_id=tenant,
                        period=period,
                        revision=revision,
                        total_nanos=document.total_nanos,
                        document=document.model_dump_json(),
                        created_at=at,
                    )
                )
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error
        return Invoice(document, revision, at)


def period_bounds(period: str) -> tuple[datetime, datetime]:
    """[start, end) of the month "YYYY-MM" in UTC. Raises OperatorError if it is not a month."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", period) or period.startswith("0000"):
        raise OperatorError(f"'{period}' is not a month; write it as 2026-11.")
    year, month = int(period[:4]), int(period[5:])
    if (year, month) == (9999, 12):
        raise OperatorError(f"'{period}' is too far away.")
    start = datetime(year, month, 1, tzinfo=UTC)
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return start, datetime(*following, 1, tzinfo=UTC)


def period_name(period: str) -> str:
    start, _ = period_bounds(period)
    return f"{calendar.month_name[start.month]} {start.year}"


def _line(total: UsageTotal, price: PriceVersion) -> InvoiceLine:
    rates, tokens = price.rates(adapter=total.adapter, batch=total.tier == "batch"), total.tokens
    return InvoiceLine(
        model=total.model,
        price=price.label,
        requests=total.requests,
        uncached_prompt_tokens=tokens.uncached,
        cached_prompt_tokens=tokens.cached,
        completion_tokens=tokens.completion,
        **rates.model_dump(),
        amount_nanos=total.cost_nanos,
        tier=total.tier,
    )
