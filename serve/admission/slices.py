"""The gateway's side of limits: what it has leased and may spend without asking.

A slice of a window is spent until its lease ends, and then closed: the store is told what was spent and
when for the last time. Places are one number for each subject, with one lease.
"""

from dataclasses import replace

from serve.admission.leases import REQUESTS, SLICES_PER_LIMIT, WINDOW_S, Pot, Report, Room


class Slice:
    """A grant of the store, partly spent. `ends`: the first instant at which it may not be spent."""

    __slots__ = ("closed", "ends", "id", "last_start", "left", "pot", "spent")

    def __init__(self, pot: Pot, grant: str, units: int, ends: float) -> None:
        self.pot = pot
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

    def report(self) -> Report:
        return Report(self.id, self.spent, self.last_start + WINDOW_S if self.spent else 0.0)


class Window:
    """One subject's slices of one window."""

    __slots__ = ("_dirty", "room", "slices")

    def __init__(self) -> None:
        self.slices: list[Slice] = []
        self.room: Room | None = None
        self._dirty: set[Slice] = set()

    def left(self, now: float) -> int:
        return sum(one.left for one in self.slices if now < one.ends)

    def unspent(self, now: float) -> int:
        """`left`, and what has lapsed but not gone back to the store."""
        return sum(one.left for one in self.slices)

    def draw(self, units: int, now: float) -> "list[Part]":
        """Take `units`, of which there must be so many left, from the slices that end first."""
        parts: list[Part] = []
        for one in self.slices:
            taken = min(one.left, units) if now < one.ends else 0
            if taken:
                one.draw(taken, now)
                parts.append((one, taken))
                units -= taken
        return parts

    def close(self, now: float, *, used: bool = False, everything: bool = False) -> list[Slice]:
        """Close slices whose lease has ended; returns all that the store must be told of.

        used: also those of which nothing is left, so that they count no longer than they must.
        """
        told = [one for one in self._dirty if one.counts(now)]
        self._dirty.clear()
        for one in self.slices:
            # What is left of tokens may grow again, at a release.
            spent = used and one.left == 0 and one.pot.what == REQUESTS
            if everything or spent or one.ends <= now:
                one.closed = True
                told.append(one)
        self.slices = [one for one in self.slices if not one.closed]
        return told

    def tell(self, closed: Slice) -> None:
        """Have `closed` among what the next `close` returns."""
        self._dirty.add(closed)
        self.outdate()

    def outdate(self) -> None:
        """What the store said is not to be refused by any more: it has been given something back."""
        if self.room:
            self.room = replace(self.room, at=0.0)

    def idle(self, since: float) -> bool:
        return not self.slices and not self._dirty and (self.room is None or self.room.at < since)


class Places:
    """One subject's places for concurrent requests: `held` until `ends`, of which some are `in_use`."""

    __slots__ = ("_stale", "ends", "held", "in_use", "last_use", "limit", "room")

    def __init__(self) -> None:
        self.held = 0
        self.in_use = 0
        self.ends = 0.0
        self.last_use = 0.0
        self.limit = 0
        self.room: Room | None = None
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


Part = tuple[Slice | Places, int]
