"""Ledger: holds credit for a request, then settles or voids the hold, exactly once.

A request reserves the most it can cost before any work is dispatched (hold). Afterwards it either pays
for what it used and returns the rest (settle), or returns everything (void). The two-phase shape is
TigerBeetle's (docs.tigerbeetle.com, "Two-Phase Transfers").

The schema carries the guarantees, not look-ups. The transaction that deletes a request's row of `open_holds`
resolves the request. (request_id, phase) is unique. The hold is a conditional UPDATE, which reserves only
available credit, whatever runs concurrently. `apply` handles many requests in one transaction.
"""

import contextlib
import json
import secrets
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

from serve.billing.budgets import budgets
from serve.billing.invoicing.periods import open_periods
from serve.billing.ledger.accounts import (
    FINAL_PHASE,
    HOLD_PHASE,
    Account,
    account_of,
    accounts_table,
    holds_table,
    lock,
    transfer,
    transfer_row,
    transfers_table,
)
from serve.billing.ledger.holds import (
    Hold,
    HoldRequest,
    InTransaction,
    OpenHold,
    Outcome,
    Resolution,
    StaleQuote,
)
from serve.billing.metering import rollups
from serve.billing.metering.events import UsageEvent, attempts_table, usage_table
from serve.billing.money import DEFAULT_CURRENCY
from serve.errors import InsufficientCredit, UnknownRecord
from serve.storage import revision
from serve.storage.database import Store, insert
from serve.tenants.audit import SYSTEM, record

# The statements of each request, built once: building and caching them took half of a hold's time.
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


class Ledger:
    """Moves money between the accounts of one store. Methods block and raise StoreUnavailable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def open_account(self, tenant: str, credit_nanos: int, *, actor: str = SYSTEM) -> None:
        """Open an account for `tenant`, or set its credit. Past transfers stay. Idempotent.

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
                audit_details = {"credit_nanos": credit_nanos}
                record(connection, "tenant.credit", tenant, audit_details, actor=actor, tenant=tenant)
        except sa.exc.IntegrityError as error:
            raise UnknownRecord(f"There is no tenant '{tenant}'.") from error

    def account(self, tenant: str) -> Account:
        """Return the tenant's account. Raises UnknownRecord if it has none."""
        with self._store.read() as connection:
            account = account_of(connection, tenant)
        if account is None:
            raise UnknownRecord(f"The tenant '{tenant}' has no account.")
        return account

    def apply(self, entries: Sequence[HoldRequest | Resolution]) -> list[Outcome]:
        """Apply all `entries` in one transaction. Return one outcome each.

        A hold request's outcome is True, or the exception that refused it: StaleQuote, InsufficientCredit,
        BudgetExceeded, or what its `in_transaction` raised. A resolution's outcome is whether it resolved
        the request: False if the request was resolved before. Any other error is raised, and no entry is
        applied.
        """
        outcomes: dict[int, Outcome] = {}
        with self._store.write() as connection:
            # Locked first and in sorted order, so that two gateways cannot deadlock.
            lock(connection, {_tenant_of(entry) for entry in entries})
            requests = [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, HoldRequest)]
            if requests:
                outcomes |= _hold_all(connection, requests)
            resolutions = [(i, entry) for i, entry in enumerate(entries) if isinstance(entry, Resolution)]
            if resolutions:
                outcomes |= _resolve_all(connection, resolutions)
        return [outcomes[i] for i in range(len(entries))]

    def hold(self, hold: Hold, *, at: datetime, lease: timedelta) -> None:
        """Reserve `hold.amount_nanos`. Raises InsufficientCredit or BudgetExceeded; then nothing changes."""
        (outcome,) = self.apply([HoldRequest(hold, at, lease)])
        if isinstance(outcome, Exception):
            raise outcome

    def settle(
        self, hold: Hold, event: UsageEvent, *, at: datetime, in_transaction: InTransaction | None = None
    ) -> bool:
        """Charge `event.cost_nanos`, return the rest of the hold and record the event, in one transaction.

        `in_transaction` runs in the same transaction. False if the request was resolved before; then
        nothing changes.
        """
        return self._resolve(
            Resolution(hold.request_id, hold.tenant, at, event=event, in_transaction=in_transaction)
        )

    def void(
        self, hold: Hold, reason: str, *, at: datetime, in_transaction: InTransaction | None = None
    ) -> bool:
        """Return the whole hold. False if the request was resolved before; then nothing changes."""
        return self._resolve(
            Resolution(hold.request_id, hold.tenant, at, reason=reason, in_transaction=in_transaction)
        )

    def open_holds(self, *, expired_at: datetime | None = None, limit: int | None = None) -> list[OpenHold]:
        """Return open holds, oldest first. With `expired_at`, only those that have expired by then."""
        c = holds_table.c
        query = sa.select(holds_table).order_by(c.created_at, c.request_id).limit(limit)
        if expired_at is not None:
            query = query.where(c.lease_expires_at < expired_at)
        with self._store.read() as connection:
            return [_open_hold(row) for row in connection.execute(query)]

    def count_open(self) -> tuple[int, datetime | None]:
        """Return the number of open holds and the creation time of the oldest."""
        c = holds_table.c
        query = sa.select(sa.func.count(), sa.func.min(c.created_at, type_=c.created_at.type))
        with self._store.read() as connection:
            count, oldest_at = connection.execute(query.select_from(holds_table)).one()
        return count, oldest_at

    def held_by(self, owner: str) -> list[OpenHold]:
        """Return the open holds of the gateway process `owner`."""
        query = sa.select(holds_table).where(holds_table.c.owner == owner)
        with self._store.read() as connection:
            return [_open_hold(row) for row in connection.execute(query)]

    def _resolve(self, resolution: Resolution) -> bool:
        (outcome,) = self.apply([resolution])
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def _tenant_of(entry: HoldRequest | Resolution) -> str:
    return entry.hold.tenant if isinstance(entry, HoldRequest) else entry.tenant


def _hold_all(connection: sa.Connection, requests: list[tuple[int, HoldRequest]]) -> dict[int, Outcome]:
    outcomes = _refuse_stale_quotes(connection, requests)
    requests = [(i, request) for i, request in requests if i not in outcomes]
    tenants = {request.hold.tenant for _, request in requests}
    subjects = {
        name for _, request in requests for name in (request.hold.project, request.hold.key_id) if name
    }
    budgets_in_force = budgets.in_force(connection, tenants, tenants | subjects)
    reserved_tenants = _reserve_by_tenant(
        connection, requests, {budget.tenant for budget in budgets_in_force}
    )
    transfer_rows, hold_rows = [], []
    for i, request in requests:
        hold = request.hold
        binding = [b for b in budgets_in_force if b.binds(hold.tenant, hold.project, hold.key_id)]
        try:
            with connection.begin_nested() if request.in_transaction or binding else contextlib.nullcontext():
                if request.in_transaction is not None:
                    request.in_transaction(connection)
                if hold.tenant not in reserved_tenants:
                    _reserve_or_raise(connection, hold)
                reservations = budgets.reserve(connection, binding, hold.amount_nanos, at=request.at)
        except sa.exc.DBAPIError:
            raise
        except Exception as refusal:
            outcomes[i] = refusal
            continue
        outcomes[i] = True
        transfer_rows.append(
            transfer_row(
                hold.request_id, HOLD_PHASE, "hold", hold.tenant, hold.amount_nanos, None, request.at
            )
        )
        hold_rows.append(
            {
                "request_id": hold.request_id,
                "tenant_id": hold.tenant,
                "amount_nanos": hold.amount_nanos,
                "budgets": json.dumps(reservations) if reservations else None,
                "terms": hold.terms,
                "owner": hold.owner,
                "lease_expires_at": request.at + request.lease,
                "created_at": request.at,
            }
        )
    if hold_rows:
        connection.execute(_INSERT_TRANSFERS, transfer_rows)
        connection.execute(_INSERT_HOLDS, hold_rows)
    return outcomes


def _refuse_stale_quotes(
    connection: sa.Connection, requests: list[tuple[int, HoldRequest]]
) -> dict[int, Outcome]:
    if all(request.revision is None for _, request in requests):
        return {}
    current_revision = revision.current(connection)
    return {i: StaleQuote() for i, request in requests if request.revision not in (None, current_revision)}


def _reserve_by_tenant(
    connection: sa.Connection, requests: list[tuple[int, HoldRequest]], budgeted_tenants: set[str]
) -> set[str]:
    """Reserve the sum of each tenant's holds by one update. Return the tenants for which that worked.

    Left out are tenants with too little credit, and those whose holds a budget or a hook may still refuse.
    """
    sums: dict[str, int] = defaultdict(int)
    excluded = set(budgeted_tenants)
    for _, request in requests:
        sums[request.hold.tenant] += request.hold.amount_nanos
        if request.in_transaction is not None:
            excluded.add(request.hold.tenant)
    return {t for t, amount in sorted(sums.items()) if t not in excluded and _reserve(connection, t, amount)}


def _reserve(connection: sa.Connection, tenant: str, amount_nanos: int) -> bool:
    return connection.execute(_RESERVE, {"t": tenant, "amount": amount_nanos}).rowcount == 1


def _reserve_or_raise(connection: sa.Connection, hold: Hold) -> None:
    """Reserve the hold's amount. Raises InsufficientCredit."""
    if not _reserve(connection, hold.tenant, hold.amount_nanos):
        account = account_of(connection, hold.tenant)
        available_nanos = account.available_nanos if account else 0
        currency = account.currency if account else DEFAULT_CURRENCY
        raise InsufficientCredit(hold.tenant, hold.amount_nanos, available_nanos, currency)


def _resolve_all(connection: sa.Connection, resolutions: list[tuple[int, Resolution]]) -> dict[int, Outcome]:
    request_ids = [resolution.request_id for _, resolution in resolutions]
    hold_rows = {row.request_id: row for row in connection.execute(_DELETE_HOLDS, {"wanted": request_ids})}
    outcomes: dict[int, Outcome] = {}
    applied: dict[str, Resolution] = {}
    for i, resolution in resolutions:
        # If the same settlement arrives twice in one transaction, the first counts.
        outcomes[i] = resolution.request_id in hold_rows and resolution.request_id not in applied
        if outcomes[i]:
            applied[resolution.request_id] = resolution
    if applied:
        _record(connection, list(applied.values()), hold_rows)
    return outcomes


def _record(connection: sa.Connection, resolutions: list[Resolution], hold_rows: dict[str, Any]) -> None:
    """Write the transfers, events, sums and balances of requests whose holds were deleted."""
    transfer_rows = [
        transfer_row(
            resolution.request_id,
            FINAL_PHASE,
            "settle" if resolution.event else "void",
            resolution.tenant,
            resolution.cost_nanos,
            resolution.reason,
            resolution.at,
        )
        for resolution in resolutions
    ]
    connection.execute(_INSERT_TRANSFERS, transfer_rows)
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    budget_releases = []
    for resolution in resolutions:
        amount = hold_rows[resolution.request_id].amount_nanos
        totals[resolution.tenant][0] += amount
        totals[resolution.tenant][1] += resolution.cost_nanos
        for budget_id, period in json.loads(hold_rows[resolution.request_id].budgets or "[]"):
            budget_releases.append(((budget_id, period), amount, resolution.cost_nanos))
    _release(connection, totals)
    budgets.release(connection, budget_releases)
    events = [resolution.event for resolution in resolutions if resolution.event is not None]
    failed = [attempt for resolution in resolutions for attempt in resolution.failed]
    periods = open_periods(connection, [(event.tenant, event.created_at) for event in events])
    if events:
        rows = [event.row() | {"period": period} for event, period in zip(events, periods, strict=True)]
        connection.execute(_INSERT_USAGE, rows)
    if failed:
        rows = [attempt.row() for attempt in failed]
        connection.execute(insert(connection, attempts_table).on_conflict_do_nothing(), rows)
    rollups.add(connection, zip(events, periods, strict=True), failed, at=resolutions[0].at)
    for resolution in resolutions:
        if resolution.in_transaction is not None:
            resolution.in_transaction(connection)


def _release(connection: sa.Connection, totals: dict[str, list[int]]) -> None:
    rows = [{"t": t, "held": held, "spent": spent} for t, (held, spent) in sorted(totals.items())]
    connection.execute(_RELEASE, rows)


def _open_hold(row: "sa.Row[Any]") -> OpenHold:
    hold = Hold(row.request_id, row.tenant_id, row.amount_nanos, terms=row.terms, owner=row.owner)
    return OpenHold(hold, row.created_at, row.lease_expires_at)
