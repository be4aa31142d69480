"""The ledger: hold → settle | void, exactly once each.

A request reserves the most it can cost before any work is dispatched (hold); afterwards it either
pays what it used and gives back the rest (settle), or gives back everything (void). The two-phase
shape is TigerBeetle's (docs.tigerbeetle.com, "Two-Phase Transfers"). Transfers are only ever added.

Two unique facts carry the guarantees, not look-ups: (request_id, phase) allows one hold and one
closing, whatever retries or races; and the hold's conditional UPDATE reserves only credit that is
there, whatever runs beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.audit import SYSTEM, record
from serve.billing.usage import UsageEvent, usage_table
from serve.db import Store, UtcDateTime, metadata
from serve.errors import InsufficientCredit, UnknownRecord

OPENING, CLOSING = 1, 2
Also = Callable[[sa.Connection], None]

accounts_table = sa.Table(
    "accounts",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("credit_nanos", sa.BigInteger, nullable=False),
    sa.Column("spent_nanos", sa.BigInteger, nullable=False),
    sa.Column("held_nanos", sa.BigInteger, nullable=False),
    sa.CheckConstraint("held_nanos >= 0", name="held_not_negative"),
)

transfers_table = sa.Table(
    "transfers",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("request_id", sa.String(64), nullable=False),
    sa.Column("phase", sa.SmallInteger, nullable=False),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("amount_nanos", sa.BigInteger, nullable=False),
    sa.Column("reason", sa.String(64)),
    sa.Column("lease_expires_at", UtcDateTime),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("request_id", "phase"),
    sa.CheckConstraint("amount_nanos >= 0", name="amount_not_negative"),
    sa.CheckConstraint("kind IN ('hold', 'settle', 'void')", name="kind_known"),
    sa.Index("ix_transfers_kind_lease_expires_at", "kind", "lease_expires_at"),
)


@dataclass(frozen=True, slots=True)
class Hold:
    request_id: str
    tenant: str
    amount_nanos: int


@dataclass(frozen=True, slots=True)
class Account:
    """Integers of nano-USD; what is available is credit − spent − held."""

    tenant: str
    credit_nanos: int
    spent_nanos: int
    held_nanos: int

    @property
    def available_nanos(self) -> int:
        return self.credit_nanos - self.spent_nanos - self.held_nanos


class Ledger:
    """The accounts and transfers of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open_account(self, tenant: str, credit_nanos: int, *, actor: str = SYSTEM) -> None:
        """Give `tenant` an account, or set its credit; the past is untouched. Idempotent.

        Raises UnknownRecord for an unknown tenant.
        """
        try:
            with self._store.write() as connection:
                changed = connection.execute(
                    accounts_table.update()
                    .where(accounts_table.c.tenant_id == tenant)
                    .values(credit_nanos=credit_nanos)
                )
                if changed.rowcount == 0:
                    row = {"tenant_id": tenant, "credit_nanos": credit_nanos}
                    connection.execute(accounts_table.insert().values(**row, spent_nanos=0, held_nanos=0))
                said = {"credit_nanos": credit_nanos}
                record(connection, "tenant.credit", tenant, said, actor=actor, tenant=tenant)
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error

    def account(self, tenant: str) -> Account:
        """Raises UnknownRecord if the tenant has no account."""
        with self._store.read() as connection:
            account = _account(connection, tenant)
        if account is None:
            raise UnknownRecord(f"The tenant '{tenant}' has no account.")
        return account

    def hold(self, connection: sa.Connection, hold: Hold, *, at: datetime, lease: timedelta) -> None:
        """Reserve `hold.amount_nanos`, inside the caller's write transaction.

        Raises InsufficientCredit, leaving nothing behind, if less than that is available.
        """
        c = accounts_table.c
        reserved = connection.execute(
            accounts_table.update()
            .where(
                c.tenant_id == hold.tenant,
                c.credit_nanos - c.spent_nanos - c.held_nanos >= hold.amount_nanos,
            )
            .values(held_nanos=c.held_nanos + hold.amount_nanos)
        )
        if reserved.rowcount == 0:
            account = _account(connection, hold.tenant)
            available = account.available_nanos if account else 0
            raise InsufficientCredit(hold.tenant, hold.amount_nanos, available)
        connection.execute(
            transfers_table.insert().values(
                request_id=hold.request_id,
                phase=OPENING,
                kind="hold",
                tenant_id=hold.tenant,
                amount_nanos=hold.amount_nanos,
                lease_expires_at=at + lease,
                created_at=at,
            )
        )

    def settle(self, hold: Hold, event: UsageEvent, *, at: datetime, also: Also | None = None) -> bool:
        """Charge `event.cost_nanos`, give back the rest of the hold, record the event: one transaction.

        `also` is what else the transaction does. False if the request was closed before, by whomever; then
        nothing changes.
        """
        with self._store.write() as connection:
            if not self._close(connection, hold, "settle", event.cost_nanos, None, at):
                return False
            connection.execute(usage_table.insert().values(event.row()))
            if also is not None:
                also(connection)
            return True

    def void(self, hold: Hold, reason: str, *, at: datetime, also: Also | None = None) -> bool:
        """Give back the whole hold. False if the request was closed before; then nothing changes."""
        with self._store.write() as connection:
            closed = self._close(connection, hold, "void", 0, reason, at)
            if closed and also is not None:
                also(connection)
            return closed

    def void_expired(self, *, at: datetime, limit: int = 100) -> int:
        """Void holds whose lease ran out: their gateway died. Returns how many; any process may call."""
        closing = transfers_table.alias()
        opening = transfers_table.c
        query = (
            sa.select(opening.request_id, opening.tenant_id, opening.amount_nanos)
            .outerjoin(closing, (closing.c.request_id == opening.request_id) & (closing.c.phase == CLOSING))
            .where(opening.kind == "hold", opening.lease_expires_at < at, closing.c.id.is_(None))
            .limit(limit)
        )
        with self._store.read() as connection:
            expired = [Hold(*row) for row in connection.execute(query)]
        return sum(self.void(hold, "lease expired", at=at) for hold in expired)

    def open_holds(self) -> list[Hold]:
        """Holds that are neither settled nor voided."""
        closed = sa.select(transfers_table.c.request_id).where(transfers_table.c.phase == CLOSING)
        c = transfers_table.c
        query = sa.select(c.request_id, c.tenant_id, c.amount_nanos).where(
            c.phase == OPENING, c.request_id.not_in(closed)
        )
        with self._store.read() as connection:
            return [Hold(*row) for row in connection.execute(query)]

    def _close(
        self,
        connection: sa.Connection,
        hold: Hold,
        kind: str,
        amount_nanos: int,
        reason: str | None,
        at: datetime,
    ) -> bool:
        row = {
            "request_id": hold.request_id,
            "phase": CLOSING,
            "kind": kind,
            "tenant_id": hold.tenant,
            "amount_nanos": amount_nanos,
            "reason": reason,
            "created_at": at,
        }
        try:
            with connection.begin_nested():
                connection.execute(transfers_table.insert().values(row))
        except sa.exc.IntegrityError:
            return False
        c = accounts_table.c
        connection.execute(
            accounts_table.update()
            .where(c.tenant_id == hold.tenant)
            .values(held_nanos=c.held_nanos - hold.amount_nanos, spent_nanos=c.spent_nanos + amount_nanos)
        )
        return True


def _account(connection: sa.Connection, tenant: str) -> Account | None:
    row = connection.execute(sa.select(accounts_table).where(accounts_table.c.tenant_id == tenant)).first()
    return Account(row.tenant_id, row.credit_nanos, row.spent_nanos, row.held_nanos) if row else None
