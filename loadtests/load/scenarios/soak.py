"""Mixed traffic for long: is the end like the beginning, in time and in memory?"""

from typing import Any

from loadtests.load.scenarios.mixed import Mixed
from loadtests.load.tally import Tally


class Soak(Mixed):
    pass


def findings(tally: Tally) -> dict[str, Any]:
    """The last quarter of the run over the first."""
    quarters = tally.course(4)
    if len(quarters) < 4:
        return {}
    first, last = quarters[0], quarters[-1]
    found: dict[str, Any] = {}
    for what in ("ttft", "itl"):
        for q in (0.5, 0.99):
            before, after = (getattr(one, what).quantile_ms(q) for one in (first, last))
            if before and after:
                found[f"{what} p{round(q * 100)}, last quarter over first"] = round(after / before, 2)
    if first.memory_mb and last.memory_mb:
        found["service memory MB, end of first quarter"] = first.memory_mb
        found["service memory MB, end of last quarter"] = last.memory_mb
    return found


USERS = (Soak,)
