"""Implements what the users of all scenarios have in common."""

import random
from typing import TYPE_CHECKING, Any, ClassVar

import gevent
from locust import User

from loadtests.load.client import Client, RequestSpec
from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.load.service_under_test import ModelAccess

if TYPE_CHECKING:
    from loadtests.load.run import LoadRun

TOPICS = (
    "the sea",
    "a mountain",
    "a small town",
    "a long journey",
    "a garden",
    "an old clock",
    "winter",
    "a train",
)
OVERLOAD = frozenset({"rate_limit_exceeded", "service_unavailable"})
PAUSE_MAX_S = 0.5
REFUSED_WAIT_S = 0.2  # the user ignores Retry-After, but does not spin either


class LoadUser(User):
    """Sends requests to the service. `expected_codes` are the error codes that its scenario provokes."""

    abstract = True
    expected_codes: ClassVar[frozenset[str]] = frozenset()
    max_tokens: ClassVar[tuple[int, int]] = (16, 64)

    def on_start(self) -> None:
        self.load_run: LoadRun = self.environment.loadtest
        self.number = self.load_run.number(type(self).__name__)
        # Seeded, so that two runs send the same requests, and no two users do.
        self.random = random.Random(f"{type(self).__name__} {self.number}")
        self.client = Client(self.load_run.service.url, self.load_run, expected_codes=self.expected_codes)
        self._sent = 0

    def on_stop(self) -> None:
        self.client.close()

    def model(self) -> ModelAccess:
        """Returns the user's own model: users take the service's models in turn."""
        models = self.load_run.service.models
        return models[self.number % len(models)]

    def send(self, row: str, model: ModelAccess, **spec: Any) -> RequestRecord:
        """Sends a request with the fields `spec` of a RequestSpec. Waits after a refusal or a failure."""
        record = self.client.send(row, model, self._make_spec(**spec))
        if record.outcome in (Outcome.REFUSED, Outcome.FAILED):
            gevent.sleep(REFUSED_WAIT_S)
        return record

    def pause(self, wait_s: float) -> None:
        """Waits, but at most PAUSE_MAX_S, so that a user notices when it is to stop."""
        gevent.sleep(min(wait_s, PAUSE_MAX_S))

    def _make_spec(self, **spec: Any) -> RequestSpec:
        """Makes a prompt of one to eight lines. No prompt is sent twice, so the prefix cache helps little."""
        self._sent += 1
        topic = self.random.choice(TOPICS)
        line = f"Write story {self._sent} of {type(self).__name__} {self.number} about {topic}. "
        return RequestSpec(line * self.random.randint(1, 8), self.random.randint(*self.max_tokens), **spec)
