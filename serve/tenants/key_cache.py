"""Caches the owners of API keys in one gateway, for one second.

An entry is used for at most `CACHE_TTL_S` after its look-up. A revoked key, a suspended tenant and changed
limits therefore reach every gateway within that time and one look-up. Refusals are not cached. The time of
a key's last use is kept in memory and written in batches by `flush`, off the path of requests.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

CACHE_TTL_S = 1.0
CACHED_KEYS_MAX = 10_000


class Keyed(Protocol):
    @property
    def key_id(self) -> str: ...


PrincipalT = TypeVar("PrincipalT", bound=Keyed)
FoundT = TypeVar("FoundT", bound=Keyed, covariant=True)


class KeyStore(Protocol[FoundT]):
    """Stores keys by their digest."""

    def digest(self, key: str) -> str:
        """Return the key's digest. Raises Unauthenticated if it cannot be a key."""

    def find(self, digest: str, at: datetime) -> FoundT:
        """Raises Unauthenticated, TenantSuspended, StoreUnavailable."""

    def note_used(self, used: Mapping[str, datetime]) -> None:
        """Store when keys were last used, by key id."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class KeyCache(Generic[PrincipalT]):
    """Caches principals by key digest. Thread-safe, except `shared`, which is for one event loop.

    `cached` never blocks; the other methods do.
    """

    def __init__(
        self,
        key_store: KeyStore[PrincipalT],
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = key_store
        self._clock_s = clock_s
        self._now = now
        self._lock = threading.Lock()
        self._cached: dict[str, tuple[float, PrincipalT]] = {}  # by digest, oldest entry first
        self._last_used: dict[str, datetime] = {}
        self._lookups: dict[str, asyncio.Task[PrincipalT]] = {}

    def cached(self, key: str) -> PrincipalT | None:
        """Return the key's principal if it is cached. Raises Unauthenticated if it cannot be a key."""
        digest = self._store.digest(key)
        with self._lock:
            looked_up_s, principal = self._cached.get(digest, (0.0, None))
            if principal is None or self._clock_s() - looked_up_s >= CACHE_TTL_S:
                return None
            self._last_used[principal.key_id] = self._now()
            return principal

    def authenticate(self, key: str) -> PrincipalT:
        """Look the key up in the store. Raises what `KeyStore.find` raises."""
        digest = self._store.digest(key)
        # Read before the look-up: a change that it misses must not live longer.
        looked_up_s, at = self._clock_s(), self._now()
        principal = self._store.find(digest, at)
        with self._lock:
            self._cached.pop(digest, None)
            if len(self._cached) >= CACHED_KEYS_MAX:
                del self._cached[next(iter(self._cached))]
            self._cached[digest] = (looked_up_s, principal)
            self._last_used[principal.key_id] = at
        return principal

    async def shared(self, key: str, look_up: Callable[[], Coroutine[Any, Any, PrincipalT]]) -> PrincipalT:
        """Return the result of `look_up`, which concurrent callers of one event loop share."""
        digest = self._store.digest(key)
        lookup = self._lookups.get(digest)
        if lookup is None:
            lookup = self._lookups[digest] = asyncio.create_task(look_up())
            lookup.add_done_callback(lambda task: self._finish_lookup(digest, task))
        return await asyncio.shield(lookup)

    def _finish_lookup(self, digest: str, lookup: "asyncio.Task[PrincipalT]") -> None:
        del self._lookups[digest]
        if not lookup.cancelled():
            lookup.exception()  # retrieved, because every caller may be gone

    def flush(self) -> None:
        """Store when keys were last used. Raises StoreUnavailable, and keeps them for the next time."""
        with self._lock:
            last_used, self._last_used = self._last_used, {}
        if not last_used:
            return
        try:
            self._store.note_used(last_used)
        except BaseException:
            with self._lock:
                self._last_used = last_used | self._last_used
            raise
