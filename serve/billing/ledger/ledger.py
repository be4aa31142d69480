"""The ledger: hold → settle | void, exactly once each.

A request reserves the most it can cost before any work is dispatched (hold); afterwards it either
pays what it used and gives back the rest (settle), or gives back everything (void). The two-phase
shape is TigerBeetle's (docs.tigerbeetle.com, "Two-Phase Transfers").

Facts of the schema carry the guarantees, not look-ups: a request is closed by whoever deletes its row of
`open_holds`; (request_id, phase) is unique; and the hold's conditional UPDATE reserves only credit that
is there, whatever runs beside it. `apply` does many requests' steps in one transaction.
"""

import contextlib
import json
import secrets
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.budgets import budgets
from serve.billing.invoicing.periods import open_periods
from serve.billing.ledger.accounts import (
    CLOSING,
    OPENING,
    Account,
    account_of,
    accounts_table,
    holds_table,
    lock,
    transfer,
    transfer_row,
    transfers_table,
)
from serve.billing.metering import rollups
from serve.billing.metering.events import FailedAttempt, UsageEvent, attempts_table, usage_table
from serve.errors import InsufficientCredit, UnknownRecord
from serve.storage import revision
from serve.storage.database import Store, insert
from serve.tenants.audit import SYSTEM, record

InTransaction = Callable[[sa.Connection], None]

# The statements of each request, built once: to build them and to know them again took half of a hold's time.
_ACCOUNT = accounts_table.c
_RESERVE = (
    accounts_table.update()
    .where(
        _ACCOUNT.tenant_id == sa.bindparam("t"),
        _ACCOUNT.credit_nanos - _ACCOUNT.spent_nanos - _ACCOUNT.held_nanos >= sa.bindparam("amount"),
    )
    .values(held_nanos=_ACCOUNT.held_nanos + sa.bindparam("amount"))
)
_RELEASE = (
    accounts_table.update()
    .where(_ACCOUNT.tenant_id == sa.bindparam("t"))
    .values(
        held_nanos=_ACCOUNT.held_nanos - sa.bindparam("held"),
        spent_nanos=_ACCOUNT.spent_nanos + sa.bindparam("spent"),
    )
)
_DELETE_HOLDS = (
    holds_table.delete()
    .where(holds_table.c.request_id.in_(sa.bindparam("wanted", expanding=True)))
    .returning(holds_table.c.request_id, holds_table.c.amount_nanos, holds_table.c.budgets)
)
_INSERT_HOLDS, _INSERT_TRANSFERS = holds_table.insert(), transfers_table.insert()
_INSERT_USAGE = usage_table.insert()


@dataclass(frozen=True, slots=True)
class Hold:
    """`sale` says, as JSON text, what the request is and at which rates (`Sale`), for whoever must settle it.

    `owner` is the gateway process that will; project and key are whose budgets bind it.
    """

    request_id: str
    tenant: str
    amount_nanos: int
    project: str | None = None
    key_id: str | None = None
    terms: str | None = None
    owner: str | None = None


@dataclass(frozen=True, slots=True)
class OpenHold:
    """A hold that is neither settled nor voided."""

    hold: Hold
    created_at: datetime
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True)
class HoldRequest:
    """A hold to be taken. `also` is done with it or refuses it by what it raises.

    `revision` (`serve.storage.revision`) is the one at which its price was read;
    at another it is refused: Outdated.
    """

    hold: Hold
    at: datetime
    lease: timedelta
    in_transaction: InTransaction | None = None
    revision: int | None = None


@dataclass(frozen=True, slots=True)
class Resolution:
    """A settlement, if there is an event, else a void. `also` is done with it, if it closes the request."""

    request_id: str
    tenant: str
    at: datetime
    event: UsageEvent | None = None
    reason: str | None = None
    in_transaction: InTransaction | None = None
    failed: tuple[FailedAttempt, ...] = ()

    @property
    def cost_nanos(self) -> int:
        return self.event.cost_nanos if self.event else 0


Outcome = bool | Exception


class StaleQuote(Exception):
    """A price or a model has changed since a hold was made out; it is to be made out again."""


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
                row = {"tenant_id": tenant, "credit_nanos": 0, "spent_nanos": 0, "held_nanos": 0}
                connection.execute(insert(connection, accounts_table).on_conflict_do_nothing(), row)
                lock(connection, [tenant])
                account = account_of(connection, tenant)
                assert account is not None
                change = credit_nanos - account.credit_nanos
                transfer(
                    connection,
                    tenant,
                    "grant" if change >= 0 else "withdraw",
                    abs(change),
                    reference=f"credit-{secrets.token_hex(8)}",
                    reason="credit set",
                    at=datetime.now(UTC),
                )
                said = {"credit_nanos": credit_nanos}
                record(connection, "tenant.credit", tenant, said, actor=actor, tenant=tenant)
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error

    def account(self, tenant: str) -> Account:
        """Raises UnknownRecord if the tenant has no account."""
        with self._store.read() as connection:
            account = account_of(connection, tenant)
        if account is None:
            raise UnknownRecord(f"The tenant '{tenant}' has no account.")
        return account

    def apply(self, entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        """Do all of `entries` in one transaction; one outcome each.

        An opening's is True, or what refused it: Outdated, InsufficientCredit, BudgetExceeded, what `also`
        raised.
        A closing's is whether it closed the request: False if it was closed before, by whomever. Whatever
        else goes wrong is raised, and nothing of any entry is done.
        """
        outcomes: dict[int, Outcome] = {}
        with self._store.write() as connection:
            # First and in one order: two gateways never wait for each other's accounts in a circle.
            lock(connection, {_tenant_of(entry) for entry in entries})
            openings = [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, HoldRequest)]
            if openings:
                outcomes |= _open_all(connection, openings)
            closings = [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, Resolution)]
            if closings:
                outcomes |= _close_all(connection, closings)
        return [outcomes[i] for i in range(len(entries))]

    def hold(self, hold: Hold, *, at: datetime, lease: timedelta) -> None:
        """Reserve `hold.amount_nanos`. Raises InsufficientCredit, BudgetExceeded, leaving nothing behind."""
        (outcome,) = self.apply([HoldRequest(hold, at, lease)])
        if isinstance(outcome, Exception):
            raise outcome

    def settle(
        self, hold: Hold, event: UsageEvent, *, at: datetime, also: InTransaction | None = None
    ) -> bool:
        """Charge `event.cost_nanos`, give back the rest of the hold, record the event: one transaction.

        `also` is what else the transaction does. False if the request was closed before, by whomever; then
        nothing changes.
        """
        return self._close(Resolution(hold.request_id, hold.tenant, at, event=event, in_transaction=also))

    def void(self, hold: Hold, reason: str, *, at: datetime, also: InTransaction | None = None) -> bool:
        """Give back the whole hold. False if the request was closed before; then nothing changes."""
        return self._close(Resolution(hold.request_id, hold.tenant, at, reason=reason, in_transaction=also))

    def open_holds(self, *, expired_at: datetime | None = None, limit: int | None = None) -> list[OpenHold]:
        """What is neither settled nor voided, oldest first; only what has expired by `expired_at`."""
        c = holds_table.c
        query = sa.select(holds_table).order_by(c.created_at, c.request_id).limit(limit)
        if expired_at is not None:
            query = query.where(c.lease_expires_at < expired_at)
        with self._store.read() as connection:
            return [_open_hold(row) for row in connection.execute(query)]

    def count_open(self) -> tuple[int, datetime | None]:
        """How many holds are open, and since when the oldest of them is."""
        c = holds_table.c
        query = sa.select(sa.func.count(), sa.func.min(c.created_at, type_=c.created_at.type))
        with self._store.read() as connection:
            count, oldest_at = connection.execute(query.select_from(holds_table)).one()
        return count, oldest_at

    def held_by(self, owner: str) -> list[OpenHold]:
        """What the gateway process `owner` has not closed."""
        query = sa.select(holds_table).where(holds_table.c.owner == owner)
        with self._store.read() as connection:
            return [_open_hold(row) for row in connection.execute(query)]

    def _close(self, closing: Resolution) -> bool:
        (outcome,) = self.apply([closing])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _tenant_of(entry: HoldRequest | Resolution) -> str:
    return entry.hold.tenant if isinstance(entry, HoldRequest) else entry.tenant


def _open_all(connection: sa.Connection, openings: list[tuple[int, HoldRequest]]) -> dict[int, Outcome]:
    outcomes = _outdated(connection, openings)
    openings = [(i, opening) for i, opening in openings if i not in outcomes]
    tenants = {opening.hold.tenant for _, opening in openings}
    asking = {name for _, opening in openings for name in (opening.hold.project, opening.hold.key_id) if name}
    bound = budgets.in_force(connection, tenants, tenants | asking)
    together = _take_together(connection, openings, {budget.tenant for budget in bound})
    transfers, opened = [], []
    for i, opening in openings:
        hold = opening.hold
        own = [b for b in bound if b.binds(hold.tenant, hold.project, hold.key_id)]
        try:
            with connection.begin_nested() if opening.in_transaction or own else contextlib.nullcontext():
                if opening.in_transaction is not None:
                    opening.in_transaction(connection)
                if hold.tenant not in together:
                    _take(connection, hold)
                reserved = budgets.reserve(connection, own, hold.amount_nanos, at=opening.at)
        except sa.exc.DBAPIError:
            raise
        except Exception as refusal:
            outcomes[i] = refusal
            continue
        outcomes[i] = True
        transfers.append(
            transfer_row(hold.request_id, OPENING, "hold", hold.tenant, hold.amount_nanos, None, opening.at)
        )
        opened.append(
            {
                "request_id": hold.request_id,
                "tenant_id": hold.tenant,
                "amount_nanos": hold.amount_nanos,
                "budgets": json.dumps(reserved) if reserved else None,
                "terms": hold.terms,
                "owner": hold.owner,
                "lease_expires_at": opening.at + opening.lease,
                "created_at": opening.at,
            }
        )
    if opened:
        connection.execute(_INSERT_TRANSFERS, transfers)
        connection.execute(_INSERT_HOLDS, opened)
    return outcomes


def _outdated(connection: sa.Connection, openings: list[tuple[int, HoldRequest]]) -> dict[int, Outcome]:
    if all(opening.revision is None for _, opening in openings):
        return {}
    now = revision.current(connection)
    return {i: StaleQuote() for i, opening in openings if opening.revision not in (None, now)}


def _take_together(
    connection: sa.Connection, openings: list[tuple[int, HoldRequest]], bound: set[str]
) -> set[str]:
    """The tenants whose holds are taken by one update: they have enough, and nothing else may refuse."""
    sums: dict[str, int] = defaultdict(int)
    alone = set(bound)
    for _, opening in openings:
        sums[opening.hold.tenant] += opening.hold.amount_nanos
        if opening.in_transaction is not None:
            alone.add(opening.hold.tenant)
    return {t for t, amount in sorted(sums.items()) if t not in alone and _reserved(connection, t, amount)}


def _reserved(connection: sa.Connection, tenant: str, amount_nanos: int) -> bool:
    return connection.execute(_RESERVE, {"t": tenant, "amount": amount_nanos}).rowcount == 1


def _take(connection: sa.Connection, hold: Hold) -> None:
    """Raises InsufficientCredit."""
    if not _reserved(connection, hold.tenant, hold.amount_nanos):
        account = account_of(connection, hold.tenant)
        raise InsufficientCredit(hold.tenant, hold.amount_nanos, account.available_nanos if account else 0)


def _close_all(connection: sa.Connection, closings: list[tuple[int, Resolution]]) -> dict[int, Outcome]:
    wanted = [closing.request_id for _, closing in closings]
    held = {row.request_id: row for row in connection.execute(_DELETE_HOLDS, {"wanted": wanted})}
    outcomes: dict[int, Outcome] = {}
    closed: dict[str, Resolution] = {}
    for i, closing in closings:
        # Of two deliveries of one settlement in the same transaction the first counts.
        outcomes[i] = closing.request_id in held and closing.request_id not in closed
        if outcomes[i]:
            closed[closing.request_id] = closing
    if closed:
        _record(connection, list(closed.values()), held)
    return outcomes


def _record(connection: sa.Connection, closed: list[Resolution], held: dict[str, Any]) -> None:
    """The transfers, events, sums and balances of requests whose holds are released."""
    transfers = [
        transfer_row(
            one.request_id,
            CLOSING,
            "settle" if one.event else "void",
            one.tenant,
            one.cost_nanos,
            one.reason,
            one.at,
        )
        for one in closed
    ]
    connection.execute(_INSERT_TRANSFERS, transfers)
    moves: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    released = []
    for one in closed:
        amount = held[one.request_id].amount_nanos
        moves[one.tenant][0] += amount
        moves[one.tenant][1] += one.cost_nanos
        for budget_id, period in json.loads(held[one.request_id].budgets or "[]"):
            released.append(((budget_id, period), amount, one.cost_nanos))
    _release(connection, moves)
    budgets.release(connection, released)
    events = [one.event for one in closed if one.event is not None]
    failed = [attempt for one in closed for attempt in one.failed]
    periods = open_periods(connection, [(event.tenant, event.created_at) for event in events])
    if events:
        rows = [event.row() | {"period": period} for event, period in zip(events, periods, strict=True)]
        connection.execute(_INSERT_USAGE, rows)
    if failed:
        rows = [attempt.row() for attempt in failed]
        connection.execute(insert(connection, attempts_table).on_conflict_do_nothing(), rows)
    rollups.add(connection, zip(events, periods, strict=True), failed, at=closed[0].at)
    for one in closed:
        if one.in_transaction is not None:
            one.in_transaction(connection)


def _release(connection: sa.Connection, moves: dict[str, list[int]]) -> None:
    rows = [{"t": t, "held": held, "spent": spent} for t, (held, spent) in sorted(moves.items())]
    connection.execute(_RELEASE, rows)


def _open_hold(row: "sa.Row[Any]") -> OpenHold:
    hold = Hold(row.request_id, row.tenant_id, row.amount_nanos, terms=row.terms, owner=row.owner)
    return OpenHold(hold, row.created_at, row.lease_expires_at)
