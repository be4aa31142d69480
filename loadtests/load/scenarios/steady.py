"""Keeps constant users, each with one stream after the other: how is the service on a normal day?"""

from locust import task

from loadtests.load.user import LoadUser


class Steady(LoadUser):
    @task
    def stream(self) -> None:
        self.send("chat stream", self.model())


USERS = (Steady,)
