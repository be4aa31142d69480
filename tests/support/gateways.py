"""Runs several gateways on one database, with a clock that tests move."""

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy as sa

from serve.errors import RateLimited, StoreUnavailable
from serve.rate_limits import Permit, RateLimiter
from serve.rate_limits.limits import Limits, Subject
from serve.storage.database import Store

LEASE_S = 2.0
CONCURRENCY_LEASE_S = 15.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class CountedStore(Store):
    """Counts its write transactions. `away` makes it fail like an unreachable database."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.writes = 0
        self.away = False

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        self.writes += 1
        if self.away:
            raise StoreUnavailable()
        with super().write() as connection:
            yield connection


class Gateways:
    """Holds several rate limiters on one database, each with its own store object, and one clock."""

    def __init__(self, url: str, count: int = 3, *, refusal_s: float = 0.05, grace_s: float = 0.01) -> None:
        self.refusal_s = refusal_s
        self.grace_s = grace_s
        self.clock = Clock()
        self.stores = [CountedStore(url) for _ in range(count)]
        self.all = [self.start(number) for number in range(count)]

    def start(self, number: int) -> RateLimiter:
        return RateLimiter(
            self.stores[number],
            f"g{number}",
            clock=self.clock,
            lease_s=LEASE_S,
            concurrency_lease_s=CONCURRENCY_LEASE_S,
            refusal_s=self.refusal_s,
            grace_s=self.grace_s,
        )

    @property
    def writes(self) -> int:
        return sum(store.writes for store in self.stores)

    def close(self) -> None:
        for store in self.stores:
            store.close()


def tenant(**limits: int) -> list[Subject]:
    return [Subject("tenant", "acme", Limits(**limits))]  # type: ignore[arg-type]


async def attempt(gateway: RateLimiter, subjects: Sequence[Subject], tokens: int = 1) -> Permit | RateLimited:
    try:
        return await gateway.admit(subjects, tokens=tokens)
    except RateLimited as refused:
        return refused


async def burst(gateways: Gateways, subjects: Sequence[Subject], count: int, tokens: int = 1) -> list[Permit]:
    """The permits of `count` requests at once, spread evenly over the gateways."""
    answers = await asyncio.gather(
        *(attempt(gateways.all[number % len(gateways.all)], subjects, tokens) for number in range(count))
    )
    return [answer for answer in answers if isinstance(answer, Permit)]


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())
