"""One tenant floods after a third of the time, far beyond its limits: what does the other one notice?

Of eight users one is quiet. The quiet ones' requests before and during the flood are rows of their own.
"""

from typing import Any

from locust import task

from loadtests.load.caller import OVERLOAD, Caller
from loadtests.load.phases import flood_begins_s
from loadtests.load.tally import Tally
from loadtests.load.target import Target, TargetError

ALONE, BESIDE, LOUD = "quiet, alone", "quiet, beside the flood", "loud"


def check(target: Target) -> None:
    if not target.loud:
        raise TargetError("A noisy neighbour needs a second tenant: LOADTEST_LOUD_KEY.")


class Quiet(Caller):
    weight = 1

    @task
    def stream(self) -> None:
        alone = self.session.tally.elapsed_s < flood_begins_s(self.session.duration_s)
        self.ask(ALONE if alone else BESIDE, self.offer())


class Loud(Caller):
    weight = 7
    expected = OVERLOAD

    @task
    def stream(self) -> None:
        wait_s = flood_begins_s(self.session.duration_s) - self.session.tally.elapsed_s
        if wait_s > 0:
            self.nap(wait_s)
        else:
            loud = self.session.target.loud
            self.ask(LOUD, loud[self.number % len(loud)])


def findings(tally: Tally) -> dict[str, Any]:
    if not {ALONE, BESIDE} <= tally.rows.keys():
        return {}
    alone, beside = tally.rows[ALONE], tally.rows[BESIDE]
    found = {}
    for what in ("ttft", "itl", "request"):
        for q in (0.5, 0.99):
            before, after = (getattr(row, what).quantile_ms(q) for row in (alone, beside))
            if before and after:
                found[f"quiet {what} p{round(q * 100)}, beside the flood over alone"] = round(
                    after / before, 2
                )
    return found


USERS = (Quiet, Loud)
