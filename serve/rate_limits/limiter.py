"""Admission: limits per minute and of concurrent requests, the same whichever gateways are asked.

A gateway leases budget from the shared store in slices (`leases`) and spends them without a round trip;
what it has not spent when a slice's lease ends goes back. Everything here runs on the event loop but the
trips themselves: one at a time, shared by all the requests that wait for one.
"""

import asyncio
import contextvars
import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TypeVar

from serve.errors import RateLimited, StoreUnavailable
from serve.rate_limits.leases import CONCURRENT, TOKENS, Bucket, LeaseReply, LeaseStore
from serve.rate_limits.limits import Subject
from serve.rate_limits.quota_cache import (
    ConcurrencyLease,
    Lease,
    Needs,
    Part,
    QuotaCache,
    RateLimitStatus,
    needs_of,
)
from serve.storage.database import Store

log = logging.getLogger(__name__)

# Requests that one trip serves at most: one transaction must not grow without bound.
_BATCH_MAX = 500
_ATTEMPTS_MAX = 3
_SWEEP_INTERVAL_S = 30.0

T = TypeVar("T")


class Permit:
    """One admitted request. Must be released once it has ended."""

    __slots__ = ("_admission", "_parts", "_tokens", "standing")

    def __init__(
        self, admission: "RateLimiter", parts: list[Part], tokens: int, standing: RateLimitStatus | None
    ) -> None:
        self._admission = admission
        self._parts = parts
        self._tokens = tokens
        self.standing = standing

    def release(self, tokens_used: int) -> None:
        """End the request's place and give back the tokens that it reserved and did not use.

        Idempotent, never blocks, never raises. Call it on the event loop that admitted the request.
        """
        parts, self._parts = self._parts, []
        if parts:
            self._admission._end(parts, max(self._tokens - max(tokens_used, 0), 0))


class _PendingPermit:
    """A request that needs a trip to the store."""

    __slots__ = ("answered", "attempts", "needs", "parts", "tokens")

    def __init__(self, needs: Needs, tokens: int) -> None:
        self.needs = needs
        self.tokens = tokens
        self.parts: list[Part] = []
        self.attempts = 0
        self.answered: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()


class RateLimiter:
    """The limits of all subjects, as one gateway keeps them. One event loop uses it.

    gateway: this gateway's name; a dead process's places are told apart by a part that is added here.
    clock: seconds since the epoch. What differs between gateways' clocks is taken from the window.
    lease_s: how long a slice of a window may be spent. places_lease_s: how long places stay without renewal.
    refusal_s: how long the store's "nothing is free" is believed. grace_s: how long a request waits for
    a place, once, before it is refused; others' idle places come back within it.
    """

    def __init__(
        self,
        store: Store,
        gateway: str,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: float = 2.0,
        places_lease_s: float = 15.0,
        settle_interval_s: float = 0.5,
        refusal_s: float = 0.05,
        grace_s: float = 0.1,
    ) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._places_lease_s = places_lease_s
        self._settle_interval_s = settle_interval_s
        self._grace_s = grace_s
        name = f"{gateway[:63]}/{secrets.token_hex(8)}"
        self._leases = LeaseStore(store, name, clock, slice_s=lease_s, places_s=places_lease_s)
        self._quota_cache = QuotaCache(lease_s, refusal_s)
        self._asks: list[_PendingPermit] = []
        self._asking: asyncio.Task[None] | None = None
        # One trip at a time: places are absolute numbers in the store, and a late one would undo a newer.
        self._trip = asyncio.Lock()
        self._idle = asyncio.Event()
        self._swept_at = clock()

    async def admit(self, subjects: Sequence[Subject], *, tokens: int) -> Permit:
        """Take a request, a place and `tokens` from all `subjects` together, or nothing from any.

        tokens: the upper bound of prompt + completion tokens. Raises RateLimited; and StoreUnavailable,
        if what was leased does not cover the request and the store is away.
        """
        needs = needs_of(subjects, tokens)
        if not needs:
            return Permit(self, [], 0, None)
        for pot, (units, limit) in needs.items():
            if units > limit:
                raise RateLimited(pot.what, limit, 0, units, None)
        try:
            return await self._admit(needs, tokens)
        except RateLimited as refused:
            if refused.what != CONCURRENT:
                raise
        # A place that another gateway has just finished with is on its way back.
        await asyncio.sleep(self._grace_s)
        return await self._admit(needs, tokens)

    async def keep_settled(self) -> None:
        """Until cancelled: renew leases, give back what is not used, drop old rows."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settle_interval_s):
                    await self._idle.wait()
                await asyncio.sleep(self._grace_s / 5)  # the next request may want the place at once
            try:
                await self.settle()
            except StoreUnavailable:
                log.warning("limits cannot be renewed: the store is away")
                await asyncio.sleep(self._settle_interval_s)
            except Exception:
                log.exception("limits could not be renewed")
                await asyncio.sleep(self._settle_interval_s)

    async def settle(self) -> None:
        """One round of `keep_settled`. Raises StoreUnavailable; then the next round does it all."""
        await self._settle(stopping=False)

    async def close(self) -> None:
        """Give back everything but the places of requests that still run. Raises nothing."""
        try:
            await self._settle(stopping=True)
        except Exception:
            log.warning("limits were not given back: the store is away; they come back with their leases")

    async def _admit(self, needs: Needs, tokens: int) -> Permit:
        ask = _PendingPermit(needs, tokens)
        if not self._asks and (permit := self._from_here(ask)):
            return permit
        self._quota_cache.refuse_if_known(ask.needs, self._clock())
        self._asks.append(ask)
        if self._asking is None or self._asking.done():
            # A context of its own: the trip serves other requests than the one that starts it.
            self._asking = asyncio.create_task(self._serve_asks(), context=contextvars.Context())
        try:
            return await ask.answered
        except asyncio.CancelledError:
            if ask.answered.done() and not ask.answered.cancelled() and not ask.answered.exception():
                self._put_back(ask.answered.result()._parts)
            raise

    def _from_here(self, ask: _PendingPermit) -> Permit | None:
        """The ticket, if what is leased covers the request."""
        now = self._clock()
        for pot, (units, limit) in ask.needs.items():
            if self._quota_cache.source(pot, limit).left(now) < units:
                return None
        for pot, (units, limit) in ask.needs.items():
            ask.parts += self._quota_cache.source(pot, limit).draw(units, now)
        return self._start(ask)

    def _start(self, ask: _PendingPermit) -> Permit:
        parts, ask.parts = ask.parts, []
        return Permit(self, parts, ask.tokens, self._quota_cache.standing(ask.needs, self._clock()))

    async def _serve_asks(self) -> None:
        while self._asks:
            async with self._trip:
                batch = self._asks[:_BATCH_MAX]
                del self._asks[:_BATCH_MAX]
                try:
                    await self._serve(batch)
                except BaseException as error:
                    for ask in batch:
                        self._put_back(ask.parts)
                        ask.parts = []
                        if not ask.answered.done():
                            known = isinstance(error, Exception)
                            ask.answered.set_exception(error if known else StoreUnavailable())
                    if not isinstance(error, Exception):
                        raise

    async def _serve(self, batch: Sequence[_PendingPermit]) -> None:
        """Answer, or queue again, every request of `batch`."""
        now = self._clock()
        buckets = {pot: limit for ask in batch for pot, (_, limit) in ask.needs.items()}
        reports = self._quota_cache.close_used(buckets, now)
        asking: list[tuple[_PendingPermit, dict[Bucket, int]]] = []
        for ask in batch:
            if ask.answered.cancelled():
                continue
            if permit := self._from_here(ask):
                ask.answered.set_result(permit)
                continue
            try:
                self._quota_cache.refuse_if_known(ask.needs, self._clock())
            except RateLimited as refused:
                ask.answered.set_exception(refused)
                continue
            missing = {}
            for pot, (units, limit) in ask.needs.items():
                source = self._quota_cache.source(pot, limit)
                here = min(source.left(now), units)
                ask.parts += source.draw(here, now)
                if here < units:
                    missing[pot] = units - here
            asking.append((ask, missing))
        if not asking:
            self._quota_cache.tell(reports)
            return
        held = {pot: one.claimed(now) for pot, one in self._quota_cache.places.items() if pot in buckets}
        demands = [missing for _, missing in asking]
        try:
            answer = await _in_thread(
                self._leases.exchange, [one.report() for one in reports], demands, buckets, held
            )
        except BaseException:
            self._quota_cache.tell(reports)
            raise
        self._take_in(answer, held)
        for (ask, missing), granted in zip(asking, answer.granted, strict=True):
            self._answer(ask, missing, granted, answer)

    def _take_in(self, answer: LeaseReply, held: Mapping[Bucket, int]) -> None:
        for pot, (grant, units) in answer.grants.items():
            if pot.what == CONCURRENT:
                self._quota_cache.places[pot].lease(held[pot] + units, answer.at + self._places_lease_s)
            else:
                self._quota_cache.windows[pot].leases.append(
                    Lease(pot, grant, units, answer.at + self._lease_s)
                )
        for pot, room in answer.availabilities.items():
            self._quota_cache.source(pot, room.limit).availability = room

    def _answer(
        self, ask: _PendingPermit, missing: Mapping[Bucket, int], granted: bool, answer: LeaseReply
    ) -> None:
        now = self._clock()
        lapsed = False
        if granted:
            # Between the store's clock reading and now a lease may have ended: the trip was slow.
            sources = {pot: self._quota_cache.source(pot, ask.needs[pot][1]) for pot in missing}
            lapsed = any(sources[pot].left(now) < units for pot, units in missing.items())
            if not lapsed:
                for pot, units in missing.items():
                    ask.parts += sources[pot].draw(units, now)
            lapsed = lapsed or not all(source.restart(now) for source, _ in ask.parts)
        if granted and not lapsed and not ask.answered.done():
            ask.answered.set_result(self._start(ask))
            return
        self._put_back(ask.parts)
        ask.parts = []
        if ask.answered.done():
            return
        if not granted:
            short = {pot: units for pot, units in missing.items() if answer.availabilities[pot].free < units}
            ask.answered.set_exception(self._quota_cache.refusal(ask.needs, short or missing, now))
            return
        ask.attempts += 1
        if ask.attempts < _ATTEMPTS_MAX:
            self._asks.append(ask)
        else:
            ask.answered.set_exception(StoreUnavailable())

    def _end(self, parts: Sequence[Part], unused_tokens: int) -> None:
        now = self._clock()
        unused: dict[Bucket, int] = {}
        for source, units in reversed(parts):  # the youngest slice first: it may be spent the longest
            if isinstance(source, ConcurrencyLease):
                source.put_back(1)
                if source.kept(now, self._settle_interval_s) < source.held:
                    self._idle.set()
            elif source.bucket.what == TOKENS:
                back = min(units, unused.setdefault(source.bucket, unused_tokens))
                unused[source.bucket] -= back
                self._return(source, back)

    def _put_back(self, parts: Sequence[Part]) -> None:
        """Undo a request that never started."""
        for source, units in parts:
            if isinstance(source, ConcurrencyLease):
                source.put_back(units)
            else:
                self._return(source, units)

    def _return(self, source: Lease, units: int) -> None:
        if units and source.put_back(units):
            self._quota_cache.tell([source])

    async def _settle(self, *, stopping: bool) -> None:
        async with self._trip:
            self._idle.clear()
            now = self._clock()
            reports = self._quota_cache.close(now, everything=stopping)
            idle_s = -1.0 if stopping else self._settle_interval_s
            renew_at = now + self._places_lease_s * 2 / 3
            places = {
                pot: one.shrink(now, idle_s)
                for pot, one in self._quota_cache.places.items()
                if one.due(now, idle_s, renew_at)
            }
            sweep = now - self._swept_at >= _SWEEP_INTERVAL_S
            if reports or places or sweep:
                try:
                    said = [one.report() for one in reports]
                    at = await _in_thread(self._leases.settle, said, places, sweep=sweep)
                except BaseException:
                    self._quota_cache.tell(reports)
                    raise
                for pot, count in places.items():
                    self._quota_cache.places[pot].lease(count, at + self._places_lease_s)
                for one in reports:
                    self._quota_cache.windows[one.bucket].outdate()
            self._swept_at = now if sweep else self._swept_at
            self._quota_cache.prune(now)


async def _in_thread(call: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call in a thread. If cancelled, the thread is waited for: its trip must not overlap with the next."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
