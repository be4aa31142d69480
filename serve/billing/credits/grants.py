"""Grants of credit: prepaid money, promotions and credit lines, some of which expire.

A grant raises the tenant's credit in the ledger when it is made. Which grant paid for what is no row of its
own: it is the replay of the grants over the days' spending, those first that expire first. What an invoice
that is final has applied stays applied. A credit line is lent, not given: it pays for nothing.
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
    """`expires_at` is a midnight: it may pay for the days before. `expired_nanos` is what was taken back."""

    id: str
    tenant: str
    kind: str
    amount_nanos: int
    reason: str | None
    created_at: datetime
    expires_at: datetime | None = None
    expired_nanos: int | None = None

    def may_pay(self, day: date) -> bool:
        begun = self.created_at.date() <= day
        return begun and (self.expires_at is None or day < self.expires_at.date())


@dataclass(frozen=True, slots=True)
class Spend:
    """What was spent on a day (UTC), and on which month's invoice it is."""

    day: date
    period: str
    nanos: int


Applied = Mapping[tuple[str, str], int]  # (grant, period) → nanos


def replay(grants: Iterable[Grant], spends: Iterable[Spend], before: Applied | None = None) -> Applied:
    """What each grant pays of each period's spending, given what of it was applied `before`.

    Day by day; of the grants that may pay that day, the one that expires first, promotions before prepaid
    money, then the older one. No grant pays more than its amount, and no spending is paid twice.
    """
    ordered = sorted((grant for grant in grants if grant.kind != "line"), key=_turn)
    left = {grant.id: grant.amount_nanos - (grant.expired_nanos or 0) for grant in ordered}
    for (grant_id, _), nanos in (before or {}).items():
        if grant_id in left:
            left[grant_id] -= nanos
    applied: dict[tuple[str, str], int] = {}
    for spend in sorted(spends, key=lambda s: (s.day, s.period)):
        owed = spend.nanos
        for grant in ordered:
            if owed <= 0:
                break
            if left[grant.id] > 0 and grant.may_pay(spend.day):
                paid = min(left[grant.id], owed)
                left[grant.id] -= paid
                owed -= paid
                key = (grant.id, spend.period)
                applied[key] = applied.get(key, 0) + paid
    return applied


def _turn(grant: Grant) -> tuple[bool, datetime, bool, datetime, str]:
    end = grant.expires_at or datetime.max.replace(tzinfo=UTC)
    return (grant.expires_at is None, end, grant.kind != "promotional", grant.created_at, grant.id)


class Credits:
    """The grants of one store. Methods block."""

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
        """Give `tenant` credit, until the end of the day (UTC) before or in which `expires_at` is.

        Raises UnknownRecord for a tenant without an account; Conflict if it expires in the past, or if the
        account's credit would exceed CREDIT_NANOS_MAX.
        """
        if expires_at is not None:
            expires_at = _midnight_from(expires_at)
            if expires_at <= at:
                raise Conflict("A grant expires in the future.")
        made = Grant(
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
                "id": made.id,
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
                reference=f"{made.id}:grant",
                reason=f"{kind} credit",
                at=at,
            )
            said = {"kind": kind, "amount_nanos": amount_nanos, "expires_at": expires_at, "reason": reason}
            record(connection, "credit.grant", made.id, said, actor=actor, tenant=tenant, at=at)
        return made

    def page(self, tenant: str | None, *, after: str | None = None, limit: int | None = None) -> Page[Grant]:
        """Oldest first, of one tenant or of all. Raises InvalidRequest if `after` is none of them."""
        whose = [] if tenant is None else [grants_table.c.tenant_id == tenant]
        with self._store.read() as connection:
            found = page(connection, grants_table, *whose, after=after, limit=limit)
        return Page([grant_of(row) for row in found.items], found.has_more)


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


def left_nanos(grants: Sequence[Grant], applied: Iterable[Applied]) -> dict[str, int]:
    """By grant, what it can still pay. A credit line's is all of it, until it has expired."""
    left = {
        grant.id: grant.amount_nanos - (grant.expired_nanos or 0)
        if grant.kind != "line" or grant.expired_nanos is None
        else 0
        for grant in grants
    }
    for some in applied:
        for (grant_id, _), nanos in some.items():
            if grant_id in left:
                left[grant_id] -= nanos
    return {grant_id: max(nanos, 0) for grant_id, nanos in left.items()}


def _midnight_from(at: datetime) -> datetime:
    day = at.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return day if day == at else day + timedelta(days=1)
