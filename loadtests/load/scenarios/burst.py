"""Calm traffic, and everybody at once every PERIOD_S: does the service recover, and what does it refuse?

The users are there all the time and wait for the burst, so that it begins with all of them in one moment.
"""

import gevent
from locust import task

from loadtests.load.caller import OVERLOAD, Caller

PERIOD_S, BURST_S = 15.0, 5.0
CALM_PART = 8  # one in so many users never waits


def burst_wait_s(at_s: float) -> float:
    """How long until the next burst, `at_s` after the start of the run; 0 in one."""
    into = at_s % PERIOD_S
    begins = PERIOD_S - BURST_S
    return max(0.0, begins - into)


class Burst(Caller):
    expected = OVERLOAD

    @task
    def stream(self) -> None:
        wait_s = burst_wait_s(self.session.tally.elapsed_s)
        if wait_s and self.number % CALM_PART:
            gevent.sleep(wait_s)
            wait_s = 0.0
        self.ask("between bursts" if wait_s else "in a burst", self.offer())


USERS = (Burst,)
