"""What the scenarios' users have in common."""

import random
from typing import TYPE_CHECKING, Any, ClassVar

import gevent
from locust import User

from loadtests.load.client import Call, Client
from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.target import Offer

if TYPE_CHECKING:
    from loadtests.load.session import Session

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
NAP_S = 0.5
REFUSED_WAIT_S = 0.2  # a client that does not heed Retry-After, but does not spin either


class Caller(User):
    """A client of the target; `expected` are the error codes that its scenario provokes."""

    abstract = True
    expected: ClassVar[frozenset[str]] = frozenset()
    max_tokens: ClassVar[tuple[int, int]] = (16, 64)

    def on_start(self) -> None:
        self.session: Session = self.environment.loadtest
        self.number = self.session.number(type(self).__name__)
        # Seeded: two runs send the same; and no two users do.
        self.random = random.Random(f"{type(self).__name__} {self.number}")
        self.client = Client(self.session.target.url, self.session, expected=self.expected)
        self._sent = 0

    def on_stop(self) -> None:
        self.client.close()

    def offer(self) -> Offer:
        """The user's own of the target's offers: users take turns."""
        offers = self.session.target.offers
        return offers[self.number % len(offers)]

    def ask(self, row: str, offer: Offer, **how: Any) -> Exchange:
        exchange = self.client.ask(row, offer, self._call(**how))
        if exchange.outcome in (Outcome.REFUSED, Outcome.FAILED):
            gevent.sleep(REFUSED_WAIT_S)
        return exchange

    def nap(self, wait_s: float) -> None:
        """Wait, but not for so long that a user who is to stop would not notice."""
        gevent.sleep(min(wait_s, NAP_S))

    def _call(self, **how: Any) -> Call:
        """Prompts of one line to eight, each sent once: the prefix cache gets little to work with."""
        self._sent += 1
        topic = self.random.choice(TOPICS)
        line = f"Write story {self._sent} of {type(self).__name__} {self.number} about {topic}. "
        return Call(line * self.random.randint(1, 8), self.random.randint(*self.max_tokens), **how)
