"""Which adapters have requests in the engine: never more than it has slots, and none for ever.

vLLM's scheduler passes over a request whose adapter has no slot for as long as others keep theirs busy. Here
such a request waits in line instead, and after `patience_s` the adapter with the fewest requests in the
engine takes no new ones until those have ended: its slot goes to whoever waits longest. So nobody waits
longer than the patience and, per `slots` adapters ahead in the line, the longest request in the engine.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic


@dataclass(eq=False)
class _Waiter:
    adapter: int
    admitted: asyncio.Future[None]
    since_s: float


class Slots:
    """The engine's adapter slots, seen from in front of it. One event loop."""

    def __init__(self, slots: int, patience_s: float) -> None:
        self._slots = slots
        self._patience_s = patience_s
        self._running: Counter[int] = Counter()
        self._closing: set[int] = set()
        self._line: list[_Waiter] = []
        self.waits = 0
        self.wait_s_max = 0.0

    @property
    def waiting(self) -> int:
        return len(self._line)

    @asynccontextmanager
    async def hold(self, adapter: int) -> AsyncIterator[None]:
        """Within the block, `adapter` counts as having one more request in the engine."""
        await self._enter(adapter)
        try:
            yield
        finally:
            self._leave(adapter)

    async def _enter(self, adapter: int) -> None:
        if self._has_room(adapter) and not (adapter not in self._running and self._line):
            self._running[adapter] += 1
            return
        waiter = _Waiter(adapter, asyncio.get_running_loop().create_future(), monotonic())
        self._line.append(waiter)
        self._admit()  # those before it may be waiting for an adapter that closes, not for a slot
        timer = asyncio.get_running_loop().call_later(self._patience_s, self._admit)
        try:
            await waiter.admitted
        except asyncio.CancelledError:
            if waiter in self._line:
                self._line.remove(waiter)
                self._admit()
            else:
                self._leave(adapter)  # admitted in the same moment
            raise
        finally:
            timer.cancel()
        waited_s = monotonic() - waiter.since_s
        self.waits += 1
        self.wait_s_max = max(self.wait_s_max, waited_s)

    def _has_room(self, adapter: int) -> bool:
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
        """Let in, oldest first, whoever has room now."""
        for waiter in list(self._line):
            # One that was cancelled stays in the line until its task runs and takes itself out.
            if self._has_room(waiter.adapter) and not waiter.admitted.cancelled():
                self._line.remove(waiter)
                self._running[waiter.adapter] += 1
                waiter.admitted.set_result(None)
        if self._make_room():
            self._admit()

    def _make_room(self) -> bool:
        """Close an adapter for each one that has been waiting too long for a slot; whether one reopened."""
        late_s = monotonic() - self._patience_s + 0.001  # timers may be early by a clock's tick
        late = {w.adapter for w in self._line if w.since_s <= late_s and w.adapter not in self._running}
        # A closed adapter with a line of its own is late too, but behind those for whom it was closed.
        for _ in range(len(late) - len(self._closing)):
            open_ = [adapter for adapter in self._running if adapter not in self._closing]
            if not open_:
                return False
            self._closing.add(min(open_, key=lambda adapter: self._running[adapter]))
        # Whoever it was closed for has given up, or has another's slot.
        surplus = len(self._closing) - len(late)
        for adapter in sorted(self._closing, key=lambda adapter: -self._running[adapter])[: max(surplus, 0)]:
            self._closing.discard(adapter)
        return surplus > 0
