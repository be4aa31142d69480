"""Credit grants: prepaid money, promotions and credit lines, some of which expire.

A grant raises the tenant's credit in the ledger when it is made. Which grant paid for what is not stored:
it is computed by replaying the grants over the days' spending, earliest expiry first. Credits that a final
invoice has applied stay applied. A credit line is lent, not given: it pays for nothing.
"""

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.ledger.accounts import accounts_table, lock_account, transfer
from serve.errors import Conflict, UnknownRecord
from serve.storage.database import Store, UtcDateTime, metadata
from serve.storage.pagination import Page, page
from serve.tenants.audit import SYSTEM, record

KINDS = ("prepaid", "promotional", "line")
CREDIT_NANOS_MAX = 10**18

grants_table = sa.Table(
    "credit_grants",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(100)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("expired_nanos", sa.BigInteger),  # what was left of it when it expired
    sa.CheckConstraint(f"kind IN {KINDS}", name="kind_known"),
    sa.CheckConstraint("amount_nanos > 0", name="amount_positive"),
)


@dataclass(frozen=True, slots=True)
class Grant:
    """Grants credit to a tenant.

    `expires_at` is a midnight: the grant may pay for the days before it. `expired_nanos` was taken back.
    """

    id: str
    tenant: str
    kind: str
    amount_nanos: int
    reason: str | None
    created_at: datetime
    expires_at: datetime | None = None
    expired_nanos: int | None = None

    def may_pay(self, day: date) -> bool:
        has_started = self.created_at.date() <= day
        return has_started and (self.expires_at is None or day < self.expires_at.date())


@dataclass(frozen=True, slots=True)
class Spend:
    """Sums what was spent on a day (UTC). `period` is the month of the invoice that bills it."""

    day: date
    period: str
    nanos: int


Applied = Mapping[tuple[str, str], int]  # (grant, period) → nanos


def replay(
    grants: Iterable[Grant], spends: Iterable[Spend], applied_before: Applied | None = None
) -> Applied:
    """Compute what each grant pays of each period's spending, beyond what was applied before.

    Spending is paid day by day. Of the grants that may pay on a day, the one that expires first pays first;
    then promotions before prepaid money; then older grants. No grant pays more than its amount, and no
    spending is paid twice.
    """
    ordered = sorted((grant for grant in grants if grant.kind != "line"), key=_spending_order)
    remaining = {grant.id: grant.amount_nanos - (grant.expired_nanos or 0) for grant in ordered}
    for (grant_id, _), nanos in (applied_before or {}).items():
        if grant_id in remaining:
            remaining[grant_id] -= nanos
    applied: dict[tuple[str, str], int] = {}
    for spend in sorted(spends, key=lambda s: (s.day, s.period)):
        owed_nanos = spend.nanos
        for grant in ordered:
            if owed_nanos <= 0:
                break
            if remaining[grant.id] > 0 and grant.may_pay(spend.day):
                paid_nanos = min(remaining[grant.id], owed_nanos)
                remaining[grant.id] -= paid_nanos
                owed_nanos -= paid_nanos
                key = (grant.id, spend.period)
                applied[key] = applied.get(key, 0) + paid_nanos
    return applied


def _spending_order(grant: Grant) -> tuple[bool, datetime, bool, datetime, str]:
    end = grant.expires_at or datetime.max.replace(tzinfo=UTC)
    return (grant.expires_at is None, end, grant.kind != "promotional", grant.created_at, grant.id)


class Credits:
    """Manages the grants of one store. Methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def grant(
        self,
        tenant: str,
        amount_nanos: int,
        *,
        kind: str,
        at: datetime,
        expires_at: datetime | None = None,
        reason: str | None = None,
        actor: str = SYSTEM,
    ) -> Grant:
        """Grant `tenant` credit. `expires_at` is rounded up to the next midnight (UTC).

        Raises UnknownRecord for a tenant without an account. Raises Conflict if the grant would expire in the
        past, or if the account's credit would exceed CREDIT_NANOS_MAX.
        """
        if expires_at is not None:
            expires_at = _midnight_from(expires_at)
            if expires_at <= at:
                raise Conflict("A grant expires in the future.")
        grant = Grant(
            f"grant_{secrets.token_hex(12)}", tenant, kind, amount_nanos, reason, at, expires_at=expires_at
        )
        with self._store.write() as connection:
            lock_account(connection, tenant)
            c = accounts_table.c
            credit = connection.execute(sa.select(c.credit_nanos).where(c.tenant_id == tenant)).scalar()
            if credit is None:
                raise UnknownRecord(f"The tenant '{tenant}' has no account.")
            if credit + amount_nanos > CREDIT_NANOS_MAX:
                raise Conflict(f"The credit of '{tenant}' would exceed {CREDIT_NANOS_MAX} nanos.")
            row = {
                "id": grant.id,
                "tenant_id": tenant,
                "kind": kind,
                "amount_nanos": amount_nanos,
                "reason": reason,
                "created_at": at,
                "expires_at": expires_at,
            }
            connection.execute(grants_table.insert().values(row))
            transfer(
                connection,
                tenant,
                "grant",
                amount_nanos,
                reference=f"{grant.id}:grant",
                reason=f"{kind} credit",
                at=at,
            )
            audit_details = {
                "kind": kind,
                "amount_nanos": amount_nanos,
                "expires_at": expires_at,
                "reason": reason,
            }
            record(connection, "credit.grant", grant.id, audit_details, actor=actor, tenant=tenant, at=at)
        return grant

    def page(self, tenant: str | None, *, after: str | None = None, limit: int | None = None) -> Page[Grant]:
        """Return grants of one tenant or of all, oldest first. Raises InvalidRequest for a bad `after`."""
        filters = [] if tenant is None else [grants_table.c.tenant_id == tenant]
        with self._store.read() as connection:
            rows = page(connection, grants_table, *filters, after=after, limit=limit)
        return Page([grant_of(row) for row in rows.items], rows.has_more)


def grants_of(connection: sa.Connection, tenant: str) -> list[Grant]:
    query = sa.select(grants_table).where(grants_table.c.tenant_id == tenant)
    return [grant_of(row) for row in connection.execute(query)]


def grant_of(row: sa.Row[Any]) -> Grant:
    return Grant(
        row.id,
        row.tenant_id,
        row.kind,
        row.amount_nanos,
        row.reason,
        row.created_at,
        row.expires_at,
        row.expired_nanos,
    )


def remaining_nanos(grants: Sequence[Grant], applied: Iterable[Applied]) -> dict[str, int]:
    """Return what each grant can still pay. A credit line keeps its full amount until it expires."""
    remaining = {
        grant.id: grant.amount_nanos - (grant.expired_nanos or 0)
        if grant.kind != "line" or grant.expired_nanos is None
        else 0
        for grant in grants
    }
    for credits in applied:
        for (grant_id, _), nanos in credits.items():
            if grant_id in remaining:
                remaining[grant_id] -= nanos
    return {grant_id: max(nanos, 0) for grant_id, nanos in remaining.items()}


def _midnight_from(at: datetime) -> datetime:
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day if day == at else day + timedelta(days=1)
