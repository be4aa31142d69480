"""Enforces limits per minute and of concurrent requests across all gateways.

A gateway leases parts of a limit from the shared store (`leases`) and spends them without a round trip.
What it has not spent when a lease ends goes back. Everything here runs on the event loop except the round
trips. One round trip runs at a time and serves all requests that wait.
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
    Allocation,
    ConcurrencyLease,
    Lease,
    Needs,
    QuotaCache,
    RateLimitStatus,
    needs_of,
)
from serve.storage.database import Store

log = logging.getLogger(__name__)

# The most requests that one round trip serves, so that a transaction has a bounded size.
_BATCH_MAX = 500
_ATTEMPTS_MAX = 3
_SWEEP_INTERVAL_S = 30.0

T = TypeVar("T")


class Permit:
    """Admits one request. Must be released once the request has ended."""

    __slots__ = ("_allocations", "_limiter", "_tokens", "status")

    def __init__(
        self,
        limiter: "RateLimiter",
        allocations: list[Allocation],
        tokens: int,
        status: RateLimitStatus | None,
    ) -> None:
        self._limiter = limiter
        self._allocations = allocations
        self._tokens = tokens
        self.status = status

    def release(self, tokens_used: int) -> None:
        """Return the request's concurrency, and the tokens that it reserved and did not use.

        Idempotent, never blocks, never raises. Call it on the event loop that admitted the request.
        """
        allocations, self._allocations = self._allocations, []
        if allocations:
            self._limiter._end(allocations, max(self._tokens - max(tokens_used, 0), 0))


class _PendingPermit:
    """Waits for a round trip to the store, for one request."""

    __slots__ = ("allocations", "attempts", "needs", "permit", "tokens")

    def __init__(self, needs: Needs, tokens: int) -> None:
        self.needs = needs
        self.tokens = tokens
        self.allocations: list[Allocation] = []
        self.attempts = 0
        self.permit: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()


class RateLimiter:
    """Admits requests of one gateway under the limits of all subjects. One event loop uses it.

    gateway: this gateway's name. A random part is added, so a dead process's concurrency is told apart.
    clock: seconds since the epoch. Differences between gateways' clocks shorten the window.
    lease_s: how long a lease of a window may be spent.
    concurrency_lease_s: how long leased concurrency lasts without renewal.
    refusal_s: how long the store's report that nothing is free is used to refuse.
    grace_s: how long a request waits, once, for concurrency before it is refused. Other gateways return
    their idle concurrency within it.
    """

    def __init__(
        self,
        store: Store,
        gateway: str,
        *,
        clock: Callable[[], float] = time.time,
        lease_s: float = 2.0,
        concurrency_lease_s: float = 15.0,
        settle_interval_s: float = 0.5,
        refusal_s: float = 0.05,
        grace_s: float = 0.1,
    ) -> None:
        self._clock = clock
        self._lease_s = lease_s
        self._concurrency_lease_s = concurrency_lease_s
        self._settle_interval_s = settle_interval_s
        self._grace_s = grace_s
        name = f"{gateway[:63]}/{secrets.token_hex(8)}"
        self._leases = LeaseStore(
            store, name, clock, lease_s=lease_s, concurrency_lease_s=concurrency_lease_s
        )
        self._quota_cache = QuotaCache(lease_s, refusal_s)
        self._pending: list[_PendingPermit] = []
        self._exchange_task: asyncio.Task[None] | None = None
        # One round trip at a time: concurrency is an absolute number in the store, and a late write would
        # undo a newer one.
        self._round_trip = asyncio.Lock()
        self._idle = asyncio.Event()
        self._swept_at = clock()

    async def admit(self, subjects: Sequence[Subject], *, tokens: int) -> Permit:
        """Take a request, a concurrent request and `tokens` from all `subjects`, or nothing from any.

        tokens: the upper bound of prompt + completion tokens. Raises RateLimited. Raises StoreUnavailable
        if the leases do not cover the request and the store is away.
        """
        needs = needs_of(subjects, tokens)
        if not needs:
            return Permit(self, [], 0, None)
        for bucket, (units, limit) in needs.items():
            if units > limit:
                raise RateLimited(bucket.what, limit, 0, units, None)
        try:
            return await self._admit(needs, tokens)
        except RateLimited as refused:
            if refused.what != CONCURRENT:
                raise
        # Concurrency that another gateway has just finished with is on its way back.
        await asyncio.sleep(self._grace_s)
        return await self._admit(needs, tokens)

    async def keep_settled(self) -> None:
        """Renew leases, return unused units and delete old rows, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settle_interval_s):
                    await self._idle.wait()
                await asyncio.sleep(self._grace_s / 5)  # the next request may need it at once
            try:
                await self.settle()
            except StoreUnavailable:
                log.warning("limits cannot be renewed: the store is away")
                await asyncio.sleep(self._settle_interval_s)
            except Exception:
                log.exception("limits could not be renewed")
                await asyncio.sleep(self._settle_interval_s)

    async def settle(self) -> None:
        """Run one round of `keep_settled`. Raises StoreUnavailable; the next round then catches up."""
        await self._settle(stopping=False)

    async def close(self) -> None:
        """Return everything except the concurrency of requests that still run. Raises nothing."""
        try:
            await self._settle(stopping=True)
        except Exception:
            log.warning("limits were not given back: the store is away; they come back with their leases")

    async def _admit(self, needs: Needs, tokens: int) -> Permit:
        pending = _PendingPermit(needs, tokens)
        if not self._pending and (permit := self._from_cache(pending)):
            return permit
        self._quota_cache.refuse_if_known(pending.needs, self._clock())
        self._pending.append(pending)
        if self._exchange_task is None or self._exchange_task.done():
            # Its own context: the round trip also serves requests other than the one that starts it.
            self._exchange_task = asyncio.create_task(self._serve_pending(), context=contextvars.Context())
        try:
            return await pending.permit
        except asyncio.CancelledError:
            if pending.permit.done() and not pending.permit.cancelled() and not pending.permit.exception():
                self._undo(pending.permit.result()._allocations)
            raise

    def _from_cache(self, pending: _PendingPermit) -> Permit | None:
        """Return the permit if the leases already held cover the request."""
        now = self._clock()
        for bucket, (units, limit) in pending.needs.items():
            if self._quota_cache.source(bucket, limit).left(now) < units:
                return None
        for bucket, (units, limit) in pending.needs.items():
            pending.allocations += self._quota_cache.source(bucket, limit).draw(units, now)
        return self._start(pending)

    def _start(self, pending: _PendingPermit) -> Permit:
        allocations, pending.allocations = pending.allocations, []
        return Permit(
            self, allocations, pending.tokens, self._quota_cache.status(pending.needs, self._clock())
        )

    async def _serve_pending(self) -> None:
        while self._pending:
            async with self._round_trip:
                batch = self._pending[:_BATCH_MAX]
                del self._pending[:_BATCH_MAX]
                try:
                    await self._serve(batch)
                except BaseException as error:
                    for pending in batch:
                        self._undo(pending.allocations)
                        pending.allocations = []
                        if not pending.permit.done():
                            known = isinstance(error, Exception)
                            pending.permit.set_exception(error if known else StoreUnavailable())
                    if not isinstance(error, Exception):
                        raise

    async def _serve(self, batch: Sequence[_PendingPermit]) -> None:
        """Resolve or queue again every request of `batch`."""
        now = self._clock()
        buckets = {bucket: limit for pending in batch for bucket, (_, limit) in pending.needs.items()}
        reports = self._quota_cache.close_used(buckets, now)
        unserved: list[tuple[_PendingPermit, dict[Bucket, int]]] = []
        for pending in batch:
            if pending.permit.cancelled():
                continue
            if permit := self._from_cache(pending):
                pending.permit.set_result(permit)
                continue
            try:
                self._quota_cache.refuse_if_known(pending.needs, self._clock())
            except RateLimited as refused:
                pending.permit.set_exception(refused)
                continue
            missing = {}
            for bucket, (units, limit) in pending.needs.items():
                source = self._quota_cache.source(bucket, limit)
                from_cache = min(source.left(now), units)
                pending.allocations += source.draw(from_cache, now)
                if from_cache < units:
                    missing[bucket] = units - from_cache
            unserved.append((pending, missing))
        if not unserved:
            self._quota_cache.report_later(reports)
            return
        held = {
            bucket: lease.counted(now)
            for bucket, lease in self._quota_cache.concurrency.items()
            if bucket in buckets
        }
        demands = [missing for _, missing in unserved]
        try:
            reply = await _in_thread(
                self._leases.exchange, [lease.report() for lease in reports], demands, buckets, held
            )
        except BaseException:
            self._quota_cache.report_later(reports)
            raise
        self._store_reply(reply, held)
        for (pending, missing), granted in zip(unserved, reply.granted, strict=True):
            self._resolve(pending, missing, granted, reply)

    def _store_reply(self, reply: LeaseReply, held: Mapping[Bucket, int]) -> None:
        for bucket, (grant_id, units) in reply.grants.items():
            if bucket.what == CONCURRENT:
                self._quota_cache.concurrency[bucket].renew(
                    held[bucket] + units, reply.at + self._concurrency_lease_s
                )
            else:
                self._quota_cache.windows[bucket].leases.append(
                    Lease(bucket, grant_id, units, reply.at + self._lease_s)
                )
        for bucket, availability in reply.availabilities.items():
            self._quota_cache.source(bucket, availability.limit).availability = availability

    def _resolve(
        self, pending: _PendingPermit, missing: Mapping[Bucket, int], granted: bool, reply: LeaseReply
    ) -> None:
        now = self._clock()
        lapsed = False
        if granted:
            # A slow round trip: a lease may have ended since the store read the clock.
            sources = {
                bucket: self._quota_cache.source(bucket, pending.needs[bucket][1]) for bucket in missing
            }
            lapsed = any(sources[bucket].left(now) < units for bucket, units in missing.items())
            if not lapsed:
                for bucket, units in missing.items():
                    pending.allocations += sources[bucket].draw(units, now)
            lapsed = lapsed or not all(source.mark_started(now) for source, _ in pending.allocations)
        if granted and not lapsed and not pending.permit.done():
            pending.permit.set_result(self._start(pending))
            return
        self._undo(pending.allocations)
        pending.allocations = []
        if pending.permit.done():
            return
        if not granted:
            short = {
                bucket: units
                for bucket, units in missing.items()
                if reply.availabilities[bucket].free < units
            }
            pending.permit.set_exception(self._quota_cache.refusal(pending.needs, short or missing, now))
            return
        pending.attempts += 1
        if pending.attempts < _ATTEMPTS_MAX:
            self._pending.append(pending)
        else:
            pending.permit.set_exception(StoreUnavailable())

    def _end(self, allocations: Sequence[Allocation], unused_tokens: int) -> None:
        now = self._clock()
        unused: dict[Bucket, int] = {}
        for source, units in reversed(allocations):  # the youngest lease first: it may be spent the longest
            if isinstance(source, ConcurrencyLease):
                source.give_back(1)
                if source.target(now, self._settle_interval_s) < source.held:
                    self._idle.set()
            elif source.bucket.what == TOKENS:
                back = min(units, unused.setdefault(source.bucket, unused_tokens))
                unused[source.bucket] -= back
                self._give_back(source, back)

    def _undo(self, allocations: Sequence[Allocation]) -> None:
        """Return the units of a request that never started."""
        for source, units in allocations:
            if isinstance(source, ConcurrencyLease):
                source.give_back(units)
            else:
                self._give_back(source, units)

    def _give_back(self, source: Lease, units: int) -> None:
        if units and source.give_back(units):
            self._quota_cache.report_later([source])

    async def _settle(self, *, stopping: bool) -> None:
        async with self._round_trip:
            self._idle.clear()
            now = self._clock()
            reports = self._quota_cache.close(now, everything=stopping)
            idle_s = -1.0 if stopping else self._settle_interval_s
            renew_at = now + self._concurrency_lease_s * 2 / 3
            concurrency = {
                bucket: lease.shrink(now, idle_s)
                for bucket, lease in self._quota_cache.concurrency.items()
                if lease.due(now, idle_s, renew_at)
            }
            sweep = now - self._swept_at >= _SWEEP_INTERVAL_S
            if reports or concurrency or sweep:
                try:
                    lease_reports = [lease.report() for lease in reports]
                    at = await _in_thread(self._leases.settle, lease_reports, concurrency, sweep=sweep)
                except BaseException:
                    self._quota_cache.report_later(reports)
                    raise
                for bucket, count in concurrency.items():
                    self._quota_cache.concurrency[bucket].renew(count, at + self._concurrency_lease_s)
                for lease in reports:
                    self._quota_cache.windows[lease.bucket].expire_availability()
            self._swept_at = now if sweep else self._swept_at
            self._quota_cache.prune(now)


async def _in_thread(call: Callable[..., T], *args: object, **kwargs: object) -> T:
    """Call in a thread. A cancelled call still waits for it: round trips must not overlap."""
    running = asyncio.ensure_future(asyncio.to_thread(call, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        raise
