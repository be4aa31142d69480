"""Calm traffic, and everybody at once every 15 seconds: does the service recover, and what does it refuse?

The users are there all the time and wait for the burst, so that it begins with all of them in one moment.
"""

from locust import task

from loadtests.load.caller import OVERLOAD, Caller
from loadtests.load.phases import burst_wait_s

CALM_PART = 8  # one in so many users never waits


class Burst(Caller):
    expected = OVERLOAD

    @task
    def stream(self) -> None:
        wait_s = burst_wait_s(self.session.tally.elapsed_s)
        if wait_s and self.number % CALM_PART:
            self.nap(wait_s)
        else:
            self.ask("between bursts" if wait_s else "in a burst", self.offer())


USERS = (Burst,)
