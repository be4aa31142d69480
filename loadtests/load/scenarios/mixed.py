"""Everything at once: chat and text completions, whole and streamed, and clients that leave in the middle."""

from locust import task

from loadtests.load.caller import Caller

LEAVE_AFTER_MOST = 8


class Mixed(Caller):
    @task(4)
    def chat_stream(self) -> None:
        self.ask("chat stream", self.offer())

    @task(2)
    def chat(self) -> None:
        self.ask("chat", self.offer(), stream=False)

    @task(2)
    def completion_stream(self) -> None:
        self.ask("completion stream", self.offer(), chat=False)

    @task(1)
    def completion(self) -> None:
        self.ask("completion", self.offer(), chat=False, stream=False)

    @task(2)
    def abort(self) -> None:
        """As soon as the answer begins, or after some pieces of it."""
        self.ask("client leaves", self.offer(), leave_after=self.random.randint(0, LEAVE_AFTER_MOST))


USERS = (Mixed,)
