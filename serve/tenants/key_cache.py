"""The door of one gateway: who a key belongs to, remembered for a second.

Nothing that was remembered is used longer than `REMEMBERED_S` after the store was asked, so a key that was
revoked, a tenant that was suspended and limits that were changed are seen by every gateway within that
time and one look-up. Refusals are not remembered. When a key was last used is noted in memory and written
in batches by `flush`, off the path of requests.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

REMEMBERED_S = 1.0
REMEMBERED_MAX = 10_000


class Keyed(Protocol):
    @property
    def key_id(self) -> str: ...


Who = TypeVar("Who", bound=Keyed)
Found = TypeVar("Found", bound=Keyed, covariant=True)


class KeyStore(Protocol[Found]):
    """Where the keys are written down."""

    def digest(self, key: str) -> str:
        """Raises Unauthenticated for what cannot be a key."""

    def find(self, digest: str, at: datetime) -> Found:
        """Raises Unauthenticated, TenantSuspended, StoreUnavailable."""

    def note_used(self, used: Mapping[str, datetime]) -> None:
        """Write down, by key id, when keys were last used."""


def utc_now() -> datetime:
    return datetime.now(UTC)


class KeyCache(Generic[Who]):
    """Thread-safe, but for `shared`, which is for one event loop. `known` never blocks; the others do."""

    def __init__(
        self,
        book: KeyStore[Who],
        *,
        clock_s: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._store = book
        self._clock_s = clock_s
        self._now = now
        self._lock = threading.Lock()
        self._remembered: dict[str, tuple[float, Who]] = {}  # by digest, the longest known first
        self._used: dict[str, datetime] = {}
        self._asking: dict[str, asyncio.Task[Who]] = {}

    def known(self, key: str) -> Who | None:
        """Whose key it is, if that is remembered. Raises Unauthenticated for what cannot be a key."""
        digest = self._store.digest(key)
        with self._lock:
            asked_s, who = self._remembered.get(digest, (0.0, None))
            if who is None or self._clock_s() - asked_s >= REMEMBERED_S:
                return None
            self._used[who.key_id] = self._now()
            return who

    def authenticate(self, key: str) -> Who:
        """Ask the store whose key it is; raises what `Book.find` raises."""
        digest = self._store.digest(key)
        asked_s, at = self._clock_s(), self._now()  # before the look-up: what it misses must not live longer
        who = self._store.find(digest, at)
        with self._lock:
            self._remembered.pop(digest, None)
            if len(self._remembered) >= REMEMBERED_MAX:
                del self._remembered[next(iter(self._remembered))]
            self._remembered[digest] = (asked_s, who)
            self._used[who.key_id] = at
        return who

    async def shared(self, key: str, ask: Callable[[], Coroutine[Any, Any, Who]]) -> Who:
        """What `ask` answers, for all of an event loop who want to know it meanwhile."""
        digest = self._store.digest(key)
        asking = self._asking.get(digest)
        if asking is None:
            asking = self._asking[digest] = asyncio.create_task(ask())
            asking.add_done_callback(lambda done: self._asked(digest, done))
        return await asyncio.shield(asking)

    def _asked(self, digest: str, done: "asyncio.Task[Who]") -> None:
        del self._asking[digest]
        if not done.cancelled():
            done.exception()  # retrieved: whoever asked may be gone

    def flush(self) -> None:
        """Write down when keys were last used. Raises StoreUnavailable, and keeps them for the next time."""
        with self._lock:
            used, self._used = self._used, {}
        if not used:
            return
        try:
            self._store.note_used(used)
        except BaseException:
            with self._lock:
                self._used = used | self._used
            raise
