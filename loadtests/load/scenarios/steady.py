"""Constant users, each with one stream after the other: what the service does on a normal day."""

from locust import task

from loadtests.load.caller import Caller


class Steady(Caller):
    @task
    def stream(self) -> None:
        self.ask("chat stream", self.offer())


USERS = (Steady,)
