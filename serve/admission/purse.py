"""What one gateway holds of everybody's limits, what it knows of the rest, and what it says of both."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from serve.admission.leases import CONCURRENT, REQUESTS, TOKENS, WINDOW_S, Pot, Room
from serve.admission.slices import Places, Slice, Window
from serve.errors import RateLimited
from serve.limits import Subject

Needs = Mapping[Pot, tuple[int, int]]
"""What a request takes of each limited pot: (units, limit)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """One limit as its user sees it; `reset_s`: until the window is empty if no more is sent."""

    limit: int
    remaining: int
    reset_s: float


@dataclass(frozen=True, slots=True)
class Standing:
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
                needs[Pot(subject.kind, subject.id, what)] = (units, limit)
    return needs


class Purse:
    """Windows and places by pot. Changes by its slices' and places' own methods, on one event loop."""

    def __init__(self, lease_s: float, refusal_s: float) -> None:
        self.windows: dict[Pot, Window] = {}
        self.places: dict[Pot, Places] = {}
        self._lease_s = lease_s
        self._refusal_s = refusal_s

    def source(self, pot: Pot, limit: int) -> Window | Places:
        """Where `pot` is drawn from; made if it is not there."""
        if pot.what == CONCURRENT:
            places = self.places.get(pot)
            if places is None:
                places = self.places[pot] = Places()
            places.limit = limit
            return places
        window = self.windows.get(pot)
        if window is None:
            window = self.windows[pot] = Window()
        return window

    def tell(self, closed: Sequence[Slice]) -> None:
        """Have the next trip tell the store what `closed` slices have come to."""
        for one in closed:
            self.windows.setdefault(one.pot, Window()).tell(one)

    def close(self, now: float, *, everything: bool) -> list[Slice]:
        """Close what has ended. Returns what the store must be told of."""
        return [one for window in self.windows.values() for one in window.close(now, everything=everything)]

    def close_used(self, pots: Iterable[Pot], now: float) -> list[Slice]:
        """As `close`, of `pots` only, and what is used up."""
        windows = [self.windows[pot] for pot in pots if pot in self.windows]
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
            room, missing = source.room, units - source.unspent(now)
            if room is None or room.limit != limit or not 0 <= now - room.at < self._refusal_s:
                continue
            tells_when = room.frees or pot.what == CONCURRENT
            if tells_when and missing > room.free_at(now):
                short[pot] = missing
        if short:
            raise self.refusal(needs, short, now)

    def refusal(self, needs: Needs, short: Mapping[Pot, int], now: float) -> RateLimited:
        """The error for the limit that takes longest to have room."""
        refusals = []
        for pot, missing in short.items():
            units, limit = needs[pot]
            source = self.source(pot, limit)
            room = source.room or Room(now, limit, 0)
            when = None if pot.what == CONCURRENT else room.when(missing)
            unknown_s = 1.0 if pot.what == CONCURRENT else WINDOW_S + self._lease_s
            wait_s = max(ceil(unknown_s if when is None else when - now), 1)
            used = min(max(limit - room.free_at(now) - source.left(now), 0), limit)
            refusals.append(RateLimited(pot.what, limit, used, units, wait_s))
        return max(refusals, key=lambda refused: refused.retry_after_s or 0)

    def standing(self, needs: Needs, now: float) -> Standing | None:
        quotas: dict[str, Quota] = {}
        for pot, (_, limit) in needs.items():
            if pot.what == CONCURRENT:
                continue
            source = self.source(pot, limit)
            known = source.room.free_at(now) if source.room else 0
            remaining = min(max(known, 0) + source.left(now), limit)
            if pot.what not in quotas or remaining < quotas[pot.what].remaining:
                quotas[pot.what] = Quota(limit, remaining, WINDOW_S)
        return Standing(quotas.get(REQUESTS), quotas.get(TOKENS)) if quotas else None
