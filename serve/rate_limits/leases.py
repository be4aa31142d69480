"""Leases parts of each subject's limits to gateways, in the store.

A *grant* leases part of a one-minute window. It counts from its creation until one minute after the
last time at which its gateway may spend it. The sum of the live grants is therefore never less than
what all gateways spent in the last minute. Grants are made under the subject's lock and never exceed
what is free, so no window is overdrawn. *Concurrency* is one row per subject and gateway (table
`limit_places`), with a lease that the gateway renews.

Times are seconds since the epoch by the gateways' clocks.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import sqlalchemy as sa

from serve.storage.database import Store, metadata

WINDOW_S = 60.0
# A grant is at most 1/20 of the limit and 1/4 of what is free, unless waiting requests need more. That leaves
# enough to other gateways, and a gateway that uses a whole limit still makes one round trip per lease.
LEASES_PER_LIMIT, LEASES_PER_FREE = 20, 4
REQUESTS, TOKENS, CONCURRENT = "requests", "tokens", "concurrent requests"

locks_table = sa.Table(
    "limit_locks",
    metadata,
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("subject", sa.String(63), primary_key=True),
)

grants_table = sa.Table(
    "limit_grants",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("kind", sa.String(8), nullable=False),
    sa.Column("subject", sa.String(63), nullable=False),
    sa.Column("what", sa.String(8), nullable=False),
    sa.Column("units", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.CheckConstraint("units >= 0", name="units_not_negative"),
    sa.Index("ix_limit_grants_kind_subject_what_expires_at", "kind", "subject", "what", "expires_at"),
    sa.Index("ix_limit_grants_expires_at", "expires_at"),
)

concurrency_table = sa.Table(
    "limit_places",
    metadata,
    sa.Column("kind", sa.String(8), primary_key=True),
    sa.Column("subject", sa.String(63), primary_key=True),
    sa.Column("gateway", sa.String(80), primary_key=True),
    sa.Column("places", sa.BigInteger, nullable=False),
    sa.Column("expires_at", sa.Double, nullable=False),
    sa.CheckConstraint("places >= 0", name="places_not_negative"),
)


class Bucket(NamedTuple):
    """Names one limit: a subject's requests, tokens or concurrent requests."""

    kind: str
    subject: str
    what: str


class LeaseReport(NamedTuple):
    """Reports how much of a grant was spent. The count is absolute, so a repeated report changes nothing."""

    id: str
    units: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Availability:
    """Records what the store reported about a bucket: `free` at `at`, and when more becomes free."""

    at: float
    limit: int
    free: int
    frees: tuple[tuple[float, int], ...] = ()
    """(time, units), earliest first."""

    def free_at(self, now: float) -> int:
        return self.free + sum(units for time, units in self.frees if time <= now)

    def when(self, units: int) -> float | None:
        """Return the earliest time at which `units` are free, if it is known."""
        free = self.free
        for time, freed in ((self.at, 0), *self.frees):
            free += freed
            if free >= units:
                return time
        return None


@dataclass(slots=True)
class LeaseReply:
    """Holds the result of one round trip to the store."""

    at: float
    granted: list[bool] = field(default_factory=list)
    """One per demand: granted wholly, or not at all."""
    availabilities: dict[Bucket, Availability] = field(default_factory=dict)
    grants: dict[Bucket, tuple[str, int]] = field(default_factory=dict)
    """(grant id, units); the id is empty for concurrency."""


class LeaseStore:
    """Leases and settles limits for one gateway. Methods block and raise StoreUnavailable.

    `gateway` must differ after every start: a dead gateway's concurrency ends with its lease.
    """

    def __init__(
        self,
        store: Store,
        gateway: str,
        clock: Callable[[], float],
        *,
        lease_s: float,
        concurrency_lease_s: float,
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._clock = clock
        self._lease_s = lease_s
        self._concurrency_lease_s = concurrency_lease_s

    def exchange(
        self,
        reports: Iterable[LeaseReport],
        demands: Sequence[Mapping[Bucket, int]],
        limits: Mapping[Bucket, int],
        held: Mapping[Bucket, int],
    ) -> LeaseReply:
        """Report, then lease what `demands` need, in one transaction; each demand wholly or not at all.

        limits: the limit of every bucket that a demand names.
        held: concurrency that the gateway holds or uses, per bucket.
        """
        buckets = sorted({bucket for demand in demands for bucket in demand})
        with self._store.write() as connection:
            # Locks are taken in the same order everywhere, or two gateways could deadlock.
            for subject in sorted({bucket[:2] for bucket in buckets}):
                _lock(connection, *subject)
            now = self._clock()  # after the lock, so the times of one subject's grants follow their order
            _report(connection, reports)
            reply = LeaseReply(now)
            free = {bucket: self._free(connection, bucket, limits[bucket], held, now) for bucket in buckets}
            granted_units = dict.fromkeys(buckets, 0)
            for demand in demands:
                fits = all(free[bucket] - granted_units[bucket] >= units for bucket, units in demand.items())
                reply.granted.append(fits)
                if fits:
                    for bucket, units in demand.items():
                        granted_units[bucket] += units
            for bucket in buckets:
                units = granted_units[bucket]
                if units:
                    share = min(limits[bucket] // LEASES_PER_LIMIT, free[bucket] // LEASES_PER_FREE)
                    units = max(units, share)
                    reply.grants[bucket] = self._grant(connection, bucket, units, held, now)
                frees = self._frees(connection, bucket, now) if not all(reply.granted) else ()
                reply.availabilities[bucket] = Availability(now, limits[bucket], free[bucket] - units, frees)
        return reply

    def settle(
        self, reports: Iterable[LeaseReport], concurrency: Mapping[Bucket, int], *, sweep: bool = False
    ) -> float:
        """Report, then set and renew the gateway's concurrency. Return the time of the transaction.

        `sweep` also deletes old rows.
        """
        with self._store.write() as connection:
            now = self._clock()
            _report(connection, reports)
            for bucket in sorted(concurrency):
                self._set_concurrency(connection, bucket, concurrency[bucket], now)
            if sweep:
                # Only rows that expired long ago: no gateway reports on those, so no two can deadlock.
                for table in (grants_table, concurrency_table):
                    connection.execute(table.delete().where(table.c.expires_at < now - WINDOW_S))
        return now

    def _free(
        self, connection: sa.Connection, bucket: Bucket, limit: int, held: Mapping[Bucket, int], now: float
    ) -> int:
        if bucket.what == CONCURRENT:
            c = concurrency_table.c
            others = sa.select(sa.func.coalesce(sa.func.sum(c.places), 0)).where(
                c.kind == bucket.kind,
                c.subject == bucket.subject,
                c.gateway != self._gateway,
                c.expires_at > now,
            )
            return limit - held.get(bucket, 0) - int(connection.execute(others).scalar_one())
        spent = sa.select(sa.func.coalesce(sa.func.sum(grants_table.c.units), 0)).where(*_live(bucket, now))
        return limit - int(connection.execute(spent).scalar_one())

    def _frees(self, connection: sa.Connection, bucket: Bucket, now: float) -> tuple[tuple[float, int], ...]:
        if bucket.what == CONCURRENT:
            return ()
        c = grants_table.c
        rows = sa.select(c.expires_at, c.units).where(*_live(bucket, now)).order_by(c.expires_at)
        return tuple((row.expires_at, row.units) for row in connection.execute(rows))

    def _grant(
        self, connection: sa.Connection, bucket: Bucket, units: int, held: Mapping[Bucket, int], now: float
    ) -> tuple[str, int]:
        if bucket.what == CONCURRENT:
            self._set_concurrency(connection, bucket, held.get(bucket, 0) + units, now)
            return "", units
        grant_id = secrets.token_hex(16)
        row = bucket._asdict() | {
            "id": grant_id,
            "units": units,
            "expires_at": now + self._lease_s + WINDOW_S,
        }
        connection.execute(grants_table.insert().values(row))
        return grant_id, units

    def _set_concurrency(self, connection: sa.Connection, bucket: Bucket, count: int, now: float) -> None:
        c = concurrency_table.c
        mine = (c.kind == bucket.kind, c.subject == bucket.subject, c.gateway == self._gateway)
        if count == 0:
            connection.execute(concurrency_table.delete().where(*mine))
            return
        values = {"places": count, "expires_at": now + self._concurrency_lease_s}
        if connection.execute(concurrency_table.update().where(*mine).values(values)).rowcount == 0:
            row = {"kind": bucket.kind, "subject": bucket.subject, "gateway": self._gateway}
            connection.execute(concurrency_table.insert().values(row | values))


def _live(bucket: Bucket, now: float) -> tuple[sa.ColumnElement[bool], ...]:
    c = grants_table.c
    return c.kind == bucket.kind, c.subject == bucket.subject, c.what == bucket.what, c.expires_at > now


def _lock(connection: sa.Connection, kind: str, subject: str) -> None:
    """Lock the subject's row until the transaction ends. SQLite has locked the whole file by now."""
    c = locks_table.c
    query = sa.select(c.kind).where(c.kind == kind, c.subject == subject).with_for_update()
    if connection.execute(query).first() is None:
        connection.execute(
            sa.text("INSERT INTO limit_locks (kind, subject) VALUES (:kind, :id) ON CONFLICT DO NOTHING"),
            {"kind": kind, "id": subject},
        )
        connection.execute(query)


def _report(connection: sa.Connection, reports: Iterable[LeaseReport]) -> None:
    c = grants_table.c
    rows = [
        {"grant": report.id, "spent": report.units, "until": report.expires_at} for report in sorted(reports)
    ]
    if rows:
        update = grants_table.update().where(c.id == sa.bindparam("grant"))
        connection.execute(update.values(units=sa.bindparam("spent"), expires_at=sa.bindparam("until")), rows)
