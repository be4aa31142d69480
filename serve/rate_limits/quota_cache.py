"""What one gateway holds of everybody's limits, what it knows of the rest, and what it says of both.

The gateway's side of limits: what it has leased and may spend without asking.

A slice of a window is spent until its lease ends, and then closed: the store is told what was spent and
when for the last time. Places are one number for each subject, with one lease.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from serve.errors import RateLimited
from serve.rate_limits.leases import (
    CONCURRENT,
    REQUESTS,
    SLICES_PER_LIMIT,
    TOKENS,
    WINDOW_S,
    Availability,
    Bucket,
    LeaseReport,
)
from serve.rate_limits.limits import Subject


class Lease:
    """A grant of the store, partly spent. `ends`: the first instant at which it may not be spent."""

    __slots__ = ("bucket", "closed", "ends", "id", "last_start", "left", "spent")

    def __init__(self, pot: Bucket, grant: str, units: int, ends: float) -> None:
        self.bucket = pot
        self.id = grant
        self.left = units
        self.spent = 0
        self.ends = ends
        self.last_start = 0.0
        self.closed = False

    def draw(self, units: int, now: float) -> None:
        self.left -= units
        self.spent += units
        self.last_start = max(self.last_start, now)

    def restart(self, now: float) -> bool:
        """Make `now` the start of what was drawn for a request that waited; False: it came too late."""
        self.last_start = max(self.last_start, now)
        return not self.closed and now < self.ends

    def put_back(self, units: int) -> bool:
        """Take back what was drawn; True if the store must be told, because the slice is closed."""
        self.spent -= units
        self.left += units
        return self.closed

    def counts(self, now: float) -> bool:
        """Whether the store still counts it."""
        return not self.closed or now < self.last_start + WINDOW_S

    def report(self) -> LeaseReport:
        return LeaseReport(self.id, self.spent, self.last_start + WINDOW_S if self.spent else 0.0)


class RateWindow:
    """One subject's slices of one window."""

    __slots__ = ("_dirty", "availability", "leases")

    def __init__(self) -> None:
        self.leases: list[Lease] = []
        self.availability: Availability | None = None
        self._dirty: set[Lease] = set()

    def left(self, now: float) -> int:
        return sum(one.left for one in self.leases if now < one.ends)

    def unspent(self, now: float) -> int:
        """`left`, and what has lapsed but not gone back to the store."""
        return sum(one.left for one in self.leases)

    def draw(self, units: int, now: float) -> "list[Part]":
        """Take `units`, of which there must be so many left, from the slices that end first."""
        parts: list[Part] = []
        for one in self.leases:
            taken = min(one.left, units) if now < one.ends else 0
            if taken:
                one.draw(taken, now)
                parts.append((one, taken))
                units -= taken
        return parts

    def close(self, now: float, *, used: bool = False, everything: bool = False) -> list[Lease]:
        """Close slices whose lease has ended; returns all that the store must be told of.

        used: also those of which nothing is left, so that they count no longer than they must.
        """
        told = [one for one in self._dirty if one.counts(now)]
        self._dirty.clear()
        for one in self.leases:
            # What is left of tokens may grow again, at a release.
            spent = used and one.left == 0 and one.bucket.what == REQUESTS
            if everything or spent or one.ends <= now:
                one.closed = True
                told.append(one)
        self.leases = [one for one in self.leases if not one.closed]
        return told

    def tell(self, closed: Lease) -> None:
        """Have `closed` among what the next `close` returns."""
        self._dirty.add(closed)
        self.outdate()

    def outdate(self) -> None:
        """What the store said is not to be refused by any more: it has been given something back."""
        if self.availability:
            self.availability = replace(self.availability, at=0.0)

    def idle(self, since: float) -> bool:
        return (
            not self.leases
            and not self._dirty
            and (self.availability is None or self.availability.at < since)
        )


class ConcurrencyLease:
    """One subject's places for concurrent requests: `held` until `ends`, of which some are `in_use`."""

    __slots__ = ("_stale", "availability", "ends", "held", "in_use", "last_use", "limit")

    def __init__(self) -> None:
        self.held = 0
        self.in_use = 0
        self.ends = 0.0
        self.last_use = 0.0
        self.limit = 0
        self.availability: Availability | None = None
        self._stale = False

    def left(self, now: float) -> int:
        return max(self.held - self.in_use, 0) if now < self.ends else 0

    def unspent(self, now: float) -> int:
        return self.left(now)

    def draw(self, units: int, now: float) -> "list[Part]":
        self.in_use += units
        self.last_use = now
        return [(self, units)] if units else []

    def restart(self, now: float) -> bool:
        return now < self.ends

    def put_back(self, units: int) -> None:
        self.in_use -= units

    def claimed(self, now: float) -> int:
        """What the store must count: after a lost lease only what is in use, which nobody can take back."""
        return max(self.held, self.in_use) if now < self.ends else self.in_use

    def lease(self, held: int, ends: float) -> None:
        self.held = held
        self.ends = ends
        self._stale = False

    def kept(self, now: float, idle_s: float) -> int:
        """Places worth keeping: those in use and, until `idle_s` after the last request, a few more."""
        spare = self.limit // SLICES_PER_LIMIT if now - self.last_use < idle_s else 0
        return min(self.claimed(now), self.in_use + spare)

    def due(self, now: float, idle_s: float, renew_at: float) -> bool:
        """Whether the store must be told: something to give back, or a lease that ends before `renew_at`."""
        renew = self.claimed(now) > 0 and self.ends < renew_at
        return self._stale or renew or self.kept(now, idle_s) != self.held

    def shrink(self, now: float, idle_s: float) -> int:
        """Stop using what is not worth keeping, before the store is told. Returns what is kept."""
        self.held = self.kept(now, idle_s)
        self._stale = True
        return self.held

    def idle(self) -> bool:
        return not (self.held or self.in_use or self._stale)


Part = tuple[Lease | ConcurrencyLease, int]


Needs = Mapping[Bucket, tuple[int, int]]
"""What a request takes of each limited pot: (units, limit)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit as its user sees it; `reset_s`: until the window is empty if no more is sent."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class RateLimitStatus:
    """What is left after a request, of the tightest subject; None: no such limit.

    `remaining` is what this gateway knows: as of its last trip to the store, less what it has spent since.
    """

    requests: Quota | None
    tokens: Quota | None


def needs_of(subjects: Sequence[Subject], tokens: int) -> Needs:
    """What a request takes of each limited pot: (units, limit)."""
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
    """Windows and places by pot. Changes by its slices' and places' own methods, on one event loop."""

    def __init__(self, lease_s: float, refusal_s: float) -> None:
        self.windows: dict[Bucket, RateWindow] = {}
        self.places: dict[Bucket, ConcurrencyLease] = {}
        self._lease_s = lease_s
        self._refusal_s = refusal_s

    def source(self, pot: Bucket, limit: int) -> RateWindow | ConcurrencyLease:
        """Where `pot` is drawn from; made if it is not there."""
        if pot.what == CONCURRENT:
            places = self.places.get(pot)
            if places is None:
                places = self.places[pot] = ConcurrencyLease()
            places.limit = limit
            return places
        window = self.windows.get(pot)
        if window is None:
            window = self.windows[pot] = RateWindow()
        return window

    def tell(self, closed: Sequence[Lease]) -> None:
        """Have the next trip tell the store what `closed` slices have come to."""
        for one in closed:
            self.windows.setdefault(one.bucket, RateWindow()).tell(one)

    def close(self, now: float, *, everything: bool) -> list[Lease]:
        """Close what has ended. Returns what the store must be told of."""
        return [one for window in self.windows.values() for one in window.close(now, everything=everything)]

    def close_used(self, buckets: Iterable[Bucket], now: float) -> list[Lease]:
        """As `close`, of `pots` only, and what is used up."""
        windows = [self.windows[pot] for pot in buckets if pot in self.windows]
        return [one for window in windows for one in window.close(now, used=True)]

    def prune(self, now: float) -> None:
        self.windows = {pot: one for pot, one in self.windows.items() if not one.idle(now - self._lease_s)}
        self.places = {pot: one for pot, one in self.places.items() if not one.idle()}

    def refuse_if_known(self, needs: Needs, now: float) -> None:
        """Raises RateLimited if the store has just said that there is not enough.

        Without this, a client that runs into its limit would make a transaction of every refusal.
        """
        short = {}
        for pot, (units, limit) in needs.items():
            source = self.source(pot, limit)
            room, missing = source.availability, units - source.unspent(now)
            if room is None or room.limit != limit or not 0 <= now - room.at < self._refusal_s:
                continue
            tells_when = room.frees or pot.what == CONCURRENT
            if tells_when and missing > room.free_at(now):
                short[pot] = missing
        if short:
            raise self.refusal(needs, short, now)

    def refusal(self, needs: Needs, short: Mapping[Bucket, int], now: float) -> RateLimited:
        """The error for the limit that takes longest to have room."""
        refusals = []
        for pot, missing in short.items():
            units, limit = needs[pot]
            source = self.source(pot, limit)
            room = source.availability or Availability(now, limit, 0)
            when = None if pot.what == CONCURRENT else room.when(missing)
            unknown_s = 1.0 if pot.what == CONCURRENT else WINDOW_S + self._lease_s
            wait_s = max(ceil(unknown_s if when is None else when - now), 1)
            used = min(max(limit - room.free_at(now) - source.left(now), 0), limit)
            refusals.append(RateLimited(pot.what, limit, used, units, wait_s))
        return max(refusals, key=lambda refused: refused.retry_after_s or 0)

    def standing(self, needs: Needs, now: float) -> RateLimitStatus | None:
        quotas: dict[str, Quota] = {}
        for pot, (_, limit) in needs.items():
            if pot.what == CONCURRENT:
                continue
            source = self.source(pot, limit)
            known = source.availability.free_at(now) if source.availability else 0
            remaining = min(max(known, 0) + source.left(now), limit)
            if pot.what not in quotas or remaining < quotas[pot.what].remaining:
                quotas[pot.what] = Quota(limit, remaining, WINDOW_S)
        return RateLimitStatus(quotas.get(REQUESTS), quotas.get(TOKENS)) if quotas else None
