"""Schedules adapters onto the engine's slots: never more than it has, and none waits without end.

vLLM's scheduler skips a request whose adapter has no slot for as long as others keep theirs busy. Here such a
request waits in a queue instead. After `patience_s` the adapter with the fewest requests in the engine is
closed: it takes no new ones until those have ended, and its slot goes to the request that waits longest. So a
request waits at most the patience plus, per `slots` adapters ahead in the queue, the longest request in the
engine.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic


@dataclass(eq=False)
class _Waiter:
    """Waits for a slot for `adapter`, since `since_s` of the monotonic clock."""

    adapter: int
    admitted: asyncio.Future[None]
    since_s: float


class Slots:
    """Admits requests to the engine by adapter slot. For one event loop."""

    def __init__(self, slots: int, patience_s: float) -> None:
        self._slots = slots
        self._patience_s = patience_s
        self._running: Counter[int] = Counter()
        self._closing: set[int] = set()
        self._queue: list[_Waiter] = []
        self.waits = 0
        self.wait_s_max = 0.0

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @asynccontextmanager
    async def hold(self, adapter: int) -> AsyncIterator[None]:
        """Counts one more request of `adapter` in the engine within the block. Waits for a slot first."""
        await self._enter(adapter)
        try:
            yield
        finally:
            self._leave(adapter)

    async def _enter(self, adapter: int) -> None:
        if self._is_free(adapter) and not (adapter not in self._running and self._queue):
            self._running[adapter] += 1
            return
        waiter = _Waiter(adapter, asyncio.get_running_loop().create_future(), monotonic())
        self._queue.append(waiter)
        self._admit()  # those before it may wait for an adapter that is closed, not for a slot
        timer = asyncio.get_running_loop().call_later(self._patience_s, self._admit)
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
                self._admit()
            else:
                self._leave(adapter)  # admitted at the same time
            raise
        finally:
            timer.cancel()
        waited_s = monotonic() - waiter.since_s
        self.waits += 1
        self.wait_s_max = max(self.wait_s_max, waited_s)

    def _is_free(self, adapter: int) -> bool:
        if adapter in self._running:
            return adapter not in self._closing
        return len(self._running) < self._slots

    def _leave(self, adapter: int) -> None:
        self._running[adapter] -= 1
        if not self._running[adapter]:
            del self._running[adapter]
            self._closing.discard(adapter)
        self._admit()

    def _admit(self) -> None:
        """Admits the requests that have a slot now, oldest first."""
        for waiter in list(self._queue):
            # A cancelled one stays in the queue until its task runs and removes it.
            if self._is_free(waiter.adapter) and not waiter.admitted.cancelled():
                self._queue.remove(waiter)
                self._running[waiter.adapter] += 1
                waiter.admitted.set_result(None)
        if self._close_for_late():
            self._admit()

    def _close_for_late(self) -> bool:
        """Closes an adapter for each one that has waited too long for a slot. True if one was reopened."""
        late_s = monotonic() - self._patience_s + 0.001  # timers may be early by a clock's tick
        late = {w.adapter for w in self._queue if w.since_s <= late_s and w.adapter not in self._running}
        # A closed adapter with a queue of its own is late too, but behind those for which it was closed.
        for _ in range(len(late) - len(self._closing)):
            open_ = [adapter for adapter in self._running if adapter not in self._closing]
            if not open_:
                return False
            self._closing.add(min(open_, key=lambda adapter: self._running[adapter]))
        # The adapter that one was closed for has given up, or has another slot.
        surplus = len(self._closing) - len(late)
        for adapter in sorted(self._closing, key=lambda adapter: -self._running[adapter])[: max(surplus, 0)]:
            self._closing.discard(adapter)
        return surplus > 0
