"""Simulates time in an event loop: it jumps to the next timer when nothing else can run."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")


class SimulatedLoop(asyncio.SelectorEventLoop):
    """Timers fire in order and at once; `asyncio.sleep` costs nothing but moves `time()` on."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__()

    def time(self) -> float:
        return self._now_s

    def _run_once(self) -> None:
        timers: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        due_s = [timer.when() for timer in timers if not timer.cancelled()]
        if due_s and not self._ready:  # type: ignore[attr-defined]
            self._now_s = max(self._now_s, min(due_s))
        super()._run_once()  # type: ignore[misc]

    def settle(self) -> None:
        """Run all that can run now, without moving the time."""
        for _ in range(10):
            self.run_until_complete(asyncio.sleep(0))

    def pass_time(self, seconds: float) -> None:
        self.run_until_complete(asyncio.sleep(seconds))


def simulate(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work` on a loop of its own, where `adapters.slots` reads the loop's time."""
    loop = SimulatedLoop()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("serve.engine.adapters.slots.monotonic", loop.time)
            return loop.run_until_complete(asyncio.wait_for(work, 1e6))
    finally:
        loop.close()
