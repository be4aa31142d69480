"""The store's side of limits: what gateways have leased of each subject's limits.

A *grant* is a slice of a minute's window. It is counted from the moment it is made until a minute
after the last moment at which its gateway may spend it, so the sum over the living grants is never
less than what was spent in the last minute, by whomever. Grants are made under the subject's lock,
and only as large as what is free: no window is ever overdrawn. *Places* are one row per subject and
gateway, with a lease that the gateway renews.

Times are seconds since the epoch by the gateways' clocks.
"""

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import sqlalchemy as sa

from serve.storage.database import Store, metadata

WINDOW_S = 60.0
# A grant is at most this part of the limit, and of what is free, unless requests in hand need more: small
# enough to leave the other gateways theirs, and full use of a limit still makes but one trip in a lease.
SLICES_PER_LIMIT, SLICES_PER_FREE = 20, 4
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

places_table = sa.Table(
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
    """One limited thing: a subject's requests, tokens or concurrent requests."""

    kind: str
    subject: str
    what: str


class LeaseReport(NamedTuple):
    """What a grant has come to: absolute, so that saying it twice does no harm."""

    id: str
    units: int
    expires_at: float


@dataclass(frozen=True, slots=True)
class Availability:
    """What the store said about a pot: `free` at `at`, and when more of it will be."""

    at: float
    limit: int
    free: int
    frees: tuple[tuple[float, int], ...] = ()
    """(time, units), earliest first."""

    def free_at(self, now: float) -> int:
        return self.free + sum(units for time, units in self.frees if time <= now)

    def when(self, units: int) -> float | None:
        """The earliest time at which `units` are free, if it is known."""
        free = self.free
        for time, freed in ((self.at, 0), *self.frees):
            free += freed
            if free >= units:
                return time
        return None


@dataclass(slots=True)
class LeaseReply:
    """What one trip to the store brought."""

    at: float
    granted: list[bool] = field(default_factory=list)
    """For each demand: all of it, or nothing of it."""
    availabilities: dict[Bucket, Availability] = field(default_factory=dict)
    grants: dict[Bucket, tuple[str, int]] = field(default_factory=dict)
    """Grant and units; places have no grant's id."""


class LeaseStore:
    """One gateway's dealings with the store. Methods block and raise StoreUnavailable.

    `gateway` must be another one after every start of a gateway: a dead one's places end with its lease.
    """

    def __init__(
        self, store: Store, gateway: str, clock: Callable[[], float], *, slice_s: float, places_s: float
    ) -> None:
        self._store = store
        self._gateway = gateway
        self._clock = clock
        self._slice_s = slice_s
        self._places_s = places_s

    def exchange(
        self,
        reports: Iterable[LeaseReport],
        demands: Sequence[Mapping[Bucket, int]],
        limits: Mapping[Bucket, int],
        held: Mapping[Bucket, int],
    ) -> LeaseReply:
        """Report, then lease what `demands` need: one transaction, each demand wholly or not at all.

        limits: of every pot that a demand names. held: places that the gateway has or uses, per pot.
        """
        buckets = sorted({bucket for demand in demands for bucket in demand})
        with self._store.write() as connection:
            # In one order everywhere, or two gateways could wait for each other.
            for subject in sorted({bucket[:2] for bucket in buckets}):
                _lock(connection, *subject)
            now = self._clock()  # after the lock: times of one subject's grants follow their order
            _report(connection, reports)
            answer = LeaseReply(now)
            free = {bucket: self._free(connection, bucket, limits[bucket], held, now) for bucket in buckets}
            taken = dict.fromkeys(buckets, 0)
            for demand in demands:
                fits = all(free[bucket] - taken[bucket] >= units for bucket, units in demand.items())
                answer.granted.append(fits)
                if fits:
                    for bucket, units in demand.items():
                        taken[bucket] += units
            for bucket in buckets:
                units = taken[bucket]
                if units:
                    share = min(limits[bucket] // SLICES_PER_LIMIT, free[bucket] // SLICES_PER_FREE)
                    units = max(units, share)
                    answer.grants[bucket] = self._grant(connection, bucket, units, held, now)
                frees = self._frees(connection, bucket, now) if not all(answer.granted) else ()
                answer.availabilities[bucket] = Availability(now, limits[bucket], free[bucket] - units, frees)
        return answer

    def settle(
        self, reports: Iterable[LeaseReport], places: Mapping[Bucket, int], *, sweep: bool = False
    ) -> float:
        """Report, set and renew the gateway's places, drop old rows if asked. Returns the time it did."""
        with self._store.write() as connection:
            now = self._clock()
            _report(connection, reports)
            for bucket in sorted(places):
                self._set_places(connection, bucket, places[bucket], now)
            if sweep:
                # Long expired only: no gateway reports on those any more, so no two wait for each other.
                for table in (grants_table, places_table):
                    connection.execute(table.delete().where(table.c.expires_at < now - WINDOW_S))
        return now

    def _free(
        self, connection: sa.Connection, bucket: Bucket, limit: int, held: Mapping[Bucket, int], now: float
    ) -> int:
        if bucket.what == CONCURRENT:
            c = places_table.c
            others = sa.select(sa.func.coalesce(sa.func.sum(c.places), 0)).where(
                c.kind == bucket.kind,
                c.subject == bucket.subject,
                c.gateway != self._gateway,
                c.expires_at > now,
            )
            return limit - held.get(bucket, 0) - int(connection.execute(others).scalar_one())
        spent = sa.select(sa.func.coalesce(sa.func.sum(grants_table.c.units), 0)).where(*_living(bucket, now))
        return limit - int(connection.execute(spent).scalar_one())

    def _frees(self, connection: sa.Connection, bucket: Bucket, now: float) -> tuple[tuple[float, int], ...]:
        if bucket.what == CONCURRENT:
            return ()
        c = grants_table.c
        rows = sa.select(c.expires_at, c.units).where(*_living(bucket, now)).order_by(c.expires_at)
        return tuple((row.expires_at, row.units) for row in connection.execute(rows))

    def _grant(
        self, connection: sa.Connection, bucket: Bucket, units: int, held: Mapping[Bucket, int], now: float
    ) -> tuple[str, int]:
        if bucket.what == CONCURRENT:
            self._set_places(connection, bucket, held.get(bucket, 0) + units, now)
            return "", units
        made = secrets.token_hex(16)
        row = bucket._asdict() | {"id": made, "units": units, "expires_at": now + self._slice_s + WINDOW_S}
        connection.execute(grants_table.insert().values(row))
        return made, units

    def _set_places(self, connection: sa.Connection, bucket: Bucket, places: int, now: float) -> None:
        c = places_table.c
        mine = (c.kind == bucket.kind, c.subject == bucket.subject, c.gateway == self._gateway)
        if places == 0:
            connection.execute(places_table.delete().where(*mine))
            return
        values = {"places": places, "expires_at": now + self._places_s}
        if connection.execute(places_table.update().where(*mine).values(values)).rowcount == 0:
            row = {"kind": bucket.kind, "subject": bucket.subject, "gateway": self._gateway}
            connection.execute(places_table.insert().values(row | values))


def _living(bucket: Bucket, now: float) -> tuple[sa.ColumnElement[bool], ...]:
    c = grants_table.c
    return c.kind == bucket.kind, c.subject == bucket.subject, c.what == bucket.what, c.expires_at > now


def _lock(connection: sa.Connection, kind: str, subject: str) -> None:
    """Hold the subject's row until the transaction ends. SQLite has the whole file by now."""
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
