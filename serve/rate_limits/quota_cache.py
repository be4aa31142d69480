"""Caches the parts of limits that one gateway has leased and may spend without a round trip.

A lease of a window is spent until it ends. It is then closed: the next round trip reports to the store
how much was spent, and when the last request started. Concurrency is one number per subject, with one
lease. The cache also computes the refusals and the rate limit headers from the store's last report.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from serve.errors import RateLimited
from serve.rate_limits.leases import (
    CONCURRENT,
    LEASES_PER_LIMIT,
    REQUESTS,
    TOKENS,
    WINDOW_S,
    Availability,
    Bucket,
    LeaseReport,
)
from serve.rate_limits.limits import Subject


class Lease:
    """Spends one grant of the store. `ends_at` is the first instant at which it may not be spent."""

    __slots__ = ("bucket", "closed", "ends_at", "id", "last_started_at", "left", "spent")

    def __init__(self, bucket: Bucket, grant_id: str, units: int, ends_at: float) -> None:
        self.bucket = bucket
        self.id = grant_id
        self.left = units
        self.spent = 0
        self.ends_at = ends_at
        self.last_started_at = 0.0
        self.closed = False

    def draw(self, units: int, now: float) -> None:
        self.left -= units
        self.spent += units
        self.last_started_at = max(self.last_started_at, now)

    def mark_started(self, now: float) -> bool:
        """Set the start of a request that waited to `now`. False if the lease has ended by then."""
        self.last_started_at = max(self.last_started_at, now)
        return not self.closed and now < self.ends_at

    def give_back(self, units: int) -> bool:
        """Return drawn units. True if the lease is closed, so the store needs a new report."""
        self.spent -= units
        self.left += units
        return self.closed

    def counts(self, now: float) -> bool:
        """Return whether the store still counts this grant."""
        return not self.closed or now < self.last_started_at + WINDOW_S

    def report(self) -> LeaseReport:
        return LeaseReport(self.id, self.spent, self.last_started_at + WINDOW_S if self.spent else 0.0)


class RateWindow:
    """Holds one subject's leases of one window."""

    __slots__ = ("_dirty", "availability", "leases")

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.availability: Availability | None = None
        self._dirty: set[Lease] = set()

    def left(self, now: float) -> int:
        return sum(lease.left for lease in self.leases if now < lease.ends_at)

    def unspent(self, now: float) -> int:
        """Return `left` plus what has lapsed and was not yet returned to the store."""
        return sum(lease.left for lease in self.leases)

    def draw(self, units: int, now: float) -> "list[Allocation]":
        """Take `units` from the leases that end first. At least `units` must be left."""
        parts: list[Allocation] = []
        for lease in self.leases:
            taken = min(lease.left, units) if now < lease.ends_at else 0
            if taken:
                lease.draw(taken, now)
                parts.append((lease, taken))
                units -= taken
        return parts

    def close(self, now: float, *, used: bool = False, everything: bool = False) -> list[Lease]:
        """Close leases that have ended. Return all leases that must be reported to the store.

        used: also close fully spent leases, so they count no longer than necessary.
        everything: close all leases.
        """
        reportable = [lease for lease in self._dirty if lease.counts(now)]
        self._dirty.clear()
        for lease in self.leases:
            # A release may return tokens to a lease, so only request leases count as fully spent.
            spent = used and lease.left == 0 and lease.bucket.what == REQUESTS
            if everything or spent or lease.ends_at <= now:
                lease.closed = True
                reportable.append(lease)
        self.leases = [lease for lease in self.leases if not lease.closed]
        return reportable

    def report_later(self, closed: Lease) -> None:
        """Include `closed` in what the next `close` returns."""
        self._dirty.add(closed)
        self.expire_availability()

    def expire_availability(self) -> None:
        """Stop refusing by the store's last report: units were returned to the store since."""
        if self.availability:
            self.availability = replace(self.availability, at=0.0)

    def idle(self, since: float) -> bool:
        return (
            not self.leases
            and not self._dirty
            and (self.availability is None or self.availability.at < since)
        )


class ConcurrencyLease:
    """Holds one subject's leased concurrency: `held` until `ends_at`, of which `in_use` are running."""

    __slots__ = ("_stale", "availability", "ends_at", "held", "in_use", "last_used_at", "limit")

    def __init__(self) -> None:
        self.held = 0
        self.in_use = 0
        self.ends_at = 0.0
        self.last_used_at = 0.0
        self.limit = 0
        self.availability: Availability | None = None
        self._stale = False

    def left(self, now: float) -> int:
        return max(self.held - self.in_use, 0) if now < self.ends_at else 0

    def unspent(self, now: float) -> int:
        return self.left(now)

    def draw(self, units: int, now: float) -> "list[Allocation]":
        self.in_use += units
        self.last_used_at = now
        return [(self, units)] if units else []

    def mark_started(self, now: float) -> bool:
        return now < self.ends_at

    def give_back(self, units: int) -> None:
        self.in_use -= units

    def counted(self, now: float) -> int:
        """Return what the store must count. After a lost lease that is only what is in use."""
        return max(self.held, self.in_use) if now < self.ends_at else self.in_use

    def renew(self, held: int, ends_at: float) -> None:
        self.held = held
        self.ends_at = ends_at
        self._stale = False

    def target(self, now: float, idle_s: float) -> int:
        """Return how much to hold: what is in use and, until `idle_s` after the last request, a few spare."""
        spare = self.limit // LEASES_PER_LIMIT if now - self.last_used_at < idle_s else 0
        return min(self.counted(now), self.in_use + spare)

    def due(self, now: float, idle_s: float, renew_at: float) -> bool:
        """Return whether a round trip is needed: to return units, or to renew a lease."""
        renew = self.counted(now) > 0 and self.ends_at < renew_at
        return self._stale or renew or self.target(now, idle_s) != self.held

    def shrink(self, now: float, idle_s: float) -> int:
        """Stop using surplus units before the store is told. Return how much stays held."""
        self.held = self.target(now, idle_s)
        self._stale = True
        return self.held

    def idle(self) -> bool:
        return not (self.held or self.in_use or self._stale)


Allocation = tuple[Lease | ConcurrencyLease, int]
"""The units of a request that were drawn from one lease."""

Needs = Mapping[Bucket, tuple[int, int]]
"""The units that a request needs from each limited bucket: (units, limit)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """Shows one limit to its user. `reset_s` is the time until the window is empty if no more is sent."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """Shows what is left after a request, for the tightest subject. None means no such limit.

    `remaining` is as of this gateway's last round trip to the store, less what it has spent since.
    """

    requests: Quota | None
    tokens: Quota | None


def needs_of(subjects: Sequence[Subject], tokens: int) -> Needs:
    """Return the units that a request needs from each limited bucket: (units, limit)."""
    needs = {}
    for subject in subjects:
        limits = subject.limits
        for what, units, limit in (
            (REQUESTS, 1, limits.requests_per_min),
            (TOKENS, tokens, limits.tokens_per_min),
            (CONCURRENT, 1, limits.concurrent_requests),
        ):
            if limit is not None and units > 0:
                needs[Bucket(subject.kind, subject.id, what)] = (units, limit)
    return needs


class QuotaCache:
    """Holds the windows and concurrency leases by bucket. One event loop uses it."""

    def __init__(self, lease_s: float, refusal_s: float) -> None:
        self.windows: dict[Bucket, RateWindow] = {}
        self.concurrency: dict[Bucket, ConcurrencyLease] = {}
        self._lease_s = lease_s
        self._refusal_s = refusal_s

    def source(self, bucket: Bucket, limit: int) -> RateWindow | ConcurrencyLease:
        """Return the leases that `bucket` is drawn from; created if missing."""
        if bucket.what == CONCURRENT:
            concurrency = self.concurrency.get(bucket)
            if concurrency is None:
                concurrency = self.concurrency[bucket] = ConcurrencyLease()
            concurrency.limit = limit
            return concurrency
        window = self.windows.get(bucket)
        if window is None:
            window = self.windows[bucket] = RateWindow()
        return window

    def report_later(self, closed: Sequence[Lease]) -> None:
        """Report `closed` leases with the next round trip."""
        for lease in closed:
            self.windows.setdefault(lease.bucket, RateWindow()).report_later(lease)

    def close(self, now: float, *, everything: bool) -> list[Lease]:
        """Close leases that have ended. Return what must be reported to the store."""
        return [
            lease for window in self.windows.values() for lease in window.close(now, everything=everything)
        ]

    def close_used(self, buckets: Iterable[Bucket], now: float) -> list[Lease]:
        """Like `close`, for `buckets` only, and including fully spent leases."""
        windows = [self.windows[bucket] for bucket in buckets if bucket in self.windows]
        return [lease for window in windows for lease in window.close(now, used=True)]

    def prune(self, now: float) -> None:
        self.windows = {
            bucket: one for bucket, one in self.windows.items() if not one.idle(now - self._lease_s)
        }
        self.concurrency = {bucket: one for bucket, one in self.concurrency.items() if not one.idle()}

    def refuse_if_known(self, needs: Needs, now: float) -> None:
        """Raise RateLimited if the store has just reported that there is not enough.

        Without this, every refusal of a client at its limit would cost a transaction.
        """
        short = {}
        for bucket, (units, limit) in needs.items():
            source = self.source(bucket, limit)
            availability, missing = source.availability, units - source.unspent(now)
            if (
                availability is None
                or availability.limit != limit
                or not 0 <= now - availability.at < self._refusal_s
            ):
                continue
            tells_when = availability.frees or bucket.what == CONCURRENT
            if tells_when and missing > availability.free_at(now):
                short[bucket] = missing
        if short:
            raise self.refusal(needs, short, now)

    def refusal(self, needs: Needs, short: Mapping[Bucket, int], now: float) -> RateLimited:
        """Return the error for the limit that takes longest to become available."""
        refusals = []
        for bucket, missing in short.items():
            units, limit = needs[bucket]
            source = self.source(bucket, limit)
            availability = source.availability or Availability(now, limit, 0)
            when = None if bucket.what == CONCURRENT else availability.when(missing)
            unknown_s = 1.0 if bucket.what == CONCURRENT else WINDOW_S + self._lease_s
            wait_s = max(ceil(unknown_s if when is None else when - now), 1)
            used = min(max(limit - availability.free_at(now) - source.left(now), 0), limit)
            refusals.append(RateLimited(bucket.what, limit, used, units, wait_s))
        return max(refusals, key=lambda refused: refused.retry_after_s or 0)

    def status(self, needs: Needs, now: float) -> RateLimitStatus | None:
        quotas: dict[str, Quota] = {}
        for bucket, (_, limit) in needs.items():
            if bucket.what == CONCURRENT:
                continue
            source = self.source(bucket, limit)
            free = source.availability.free_at(now) if source.availability else 0
            remaining = min(max(free, 0) + source.left(now), limit)
            if bucket.what not in quotas or remaining < quotas[bucket.what].remaining:
                quotas[bucket.what] = Quota(limit, remaining, WINDOW_S)
        return RateLimitStatus(quotas.get(REQUESTS), quotas.get(TOKENS)) if quotas else None
