"""Sends calm traffic with a burst every 15 seconds: does the service recover, and what does it refuse?

All users exist from the start and wait for the burst, so it begins with all of them at once.
"""

from locust import task

from loadtests.load.phases import burst_wait_s
from loadtests.load.user import OVERLOAD, LoadUser

CALM_PART = 8  # one user in so many never waits


class Burst(LoadUser):
    expected_codes = OVERLOAD

    @task
    def stream(self) -> None:
        wait_s = burst_wait_s(self.load_run.measurements.elapsed_s)
        if wait_s and self.number % CALM_PART:
            self.pause(wait_s)
        else:
            self.send("between bursts" if wait_s else "in a burst", self.model())


USERS = (Burst,)
