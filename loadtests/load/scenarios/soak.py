"""Sends mixed traffic for long: is the end like the beginning, in time and in memory?"""

from typing import Any

from loadtests.load.measurements import Measurements
from loadtests.load.scenarios.mixed import Mixed


class Soak(Mixed):
    pass


def findings(measurements: Measurements) -> dict[str, Any]:
    """Compares the last quarter of the run with the first."""
    quarters = measurements.timeline(4)
    if len(quarters) < 4:
        return {}
    first, last = quarters[0], quarters[-1]
    results: dict[str, Any] = {}
    for time in ("ttft", "itl"):
        for q in (0.5, 0.99):
            before, after = (getattr(quarter, time).quantile_ms(q) for quarter in (first, last))
            if before and after:
                results[f"{time} p{round(q * 100)}, last quarter over first"] = round(after / before, 2)
    if first.memory_mb and last.memory_mb:
        results["service memory MB, end of first quarter"] = first.memory_mb
        results["service memory MB, end of last quarter"] = last.memory_mb
    return results


USERS = (Soak,)
