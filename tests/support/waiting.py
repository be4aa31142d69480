"""Waits for a condition with a bound, in place of a sleep for luck."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, interval_s: float = 0.05) -> None:
    """Fails the test if `condition` does not come true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(interval_s)
