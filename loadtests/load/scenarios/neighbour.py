"""Lets one tenant flood the service beyond its limits after a third of the time: what does another notice?

One user in eight is quiet. The quiet ones' requests before and during the flood are rows of their own.
"""

from typing import Any

from locust import task

from loadtests.load.measurements import Measurements
from loadtests.load.phases import flood_begins_s
from loadtests.load.service_under_test import ServiceError, ServiceUnderTest
from loadtests.load.user import OVERLOAD, LoadUser

ALONE, BESIDE, LOUD = "quiet, alone", "quiet, beside the flood", "loud"


def check(service: ServiceUnderTest) -> None:
    if not service.loud_models:
        raise ServiceError("A noisy neighbour needs a second tenant: LOADTEST_LOUD_KEY.")


class Quiet(LoadUser):
    weight = 1

    @task
    def stream(self) -> None:
        alone = self.load_run.measurements.elapsed_s < flood_begins_s(self.load_run.duration_s)
        self.send(ALONE if alone else BESIDE, self.model())


class Loud(LoadUser):
    weight = 7
    expected_codes = OVERLOAD

    @task
    def stream(self) -> None:
        wait_s = flood_begins_s(self.load_run.duration_s) - self.load_run.measurements.elapsed_s
        if wait_s > 0:
            self.pause(wait_s)
        else:
            loud = self.load_run.service.loud_models
            self.send(LOUD, loud[self.number % len(loud)])


def findings(measurements: Measurements) -> dict[str, Any]:
    if not {ALONE, BESIDE} <= measurements.rows.keys():
        return {}
    alone, beside = measurements.rows[ALONE], measurements.rows[BESIDE]
    ratios = {}
    for time in ("ttft", "itl", "request"):
        for q in (0.5, 0.99):
            before, after = (getattr(row, time).quantile_ms(q) for row in (alone, beside))
            if before and after:
                ratios[f"quiet {time} p{round(q * 100)}, beside the flood over alone"] = round(
                    after / before, 2
                )
    return ratios


USERS = (Quiet, Loud)
