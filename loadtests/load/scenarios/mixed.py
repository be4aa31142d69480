"""Mixes chat and text completions, whole and streamed, and clients that leave in the middle."""

from locust import task

from loadtests.load.user import LoadUser

LEAVE_AFTER_MOST = 8


class Mixed(LoadUser):
    @task(4)
    def chat_stream(self) -> None:
        self.send("chat stream", self.model())

    @task(2)
    def chat(self) -> None:
        self.send("chat", self.model(), stream=False)

    @task(2)
    def completion_stream(self) -> None:
        self.send("completion stream", self.model(), chat=False)

    @task(1)
    def completion(self) -> None:
        self.send("completion", self.model(), chat=False, stream=False)

    @task(2)
    def abort(self) -> None:
        """Leaves as soon as the answer begins, or after some pieces of it."""
        self.send("client leaves", self.model(), leave_after=self.random.randint(0, LEAVE_AFTER_MOST))


USERS = (Mixed,)
