"""Tests invariant 7 under parallel requests, in several processes, and in any order of events."""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from serve.errors import RateLimited
from serve.rate_limits import Permit, RateLimiter
from serve.rate_limits.limits import Limits, Subject
from serve.storage.database import Store
from tests.support.databases import NewDatabase
from tests.support.gateways import Gateways, attempt, burst, run, tenant


@pytest.fixture
def gateways(store: Store) -> Iterator[Gateways]:
    gateways = Gateways(store.url)
    yield gateways
    gateways.close()


# A gateway holds at most one unfinished lease of limit / 20 units, and the gateway that refuses holds none.
@pytest.mark.parametrize(("limit", "least"), [(5, 5), (100, 100 - 2 * 4), (199, 199 - 2 * 8)])
def test_of_200_parallel_requests_over_three_gateways_the_limit_passes(
    gateways: Gateways, limit: int, least: int
) -> None:
    async def test() -> None:
        passed = await burst(gateways, tenant(requests_per_min=limit), 200)
        assert least <= len(passed) <= limit

    run(test)


def test_parallel_requests_reserve_no_more_tokens_than_the_limit(gateways: Gateways) -> None:
    async def test() -> None:
        passed = await burst(gateways, tenant(tokens_per_min=10_000), 200, tokens=130)
        assert 10_000 - 2 * 500 - 3 * 129 <= len(passed) * 130 <= 10_000

    run(test)


def test_in_no_60_seconds_do_more_requests_start_than_the_limit(gateways: Gateways) -> None:
    async def test() -> None:
        starts: list[float] = []
        subjects = tenant(requests_per_min=40)
        for step in range(280):
            for number in range(step % 4):
                if isinstance(await attempt(gateways.all[(step + number) % 3], subjects), Permit):
                    starts.append(gateways.clock.now)
            gateways.clock.now += 0.5
            for gateway in gateways.all:
                await gateway.settle()
        busiest = max(sum(start <= other < start + 60 for other in starts) for start in starts)
        assert 40 - 2 * 2 <= busiest <= 40
        assert len(starts) >= 2 * (40 - 2 * 2)  # and the window slides: 140 s have two full minutes

    run(test)


def spend_in_a_process(url: str, number: int, start_at: float) -> int:
    """Return how many of a process's share of 200 requests pass."""

    async def spend() -> int:
        store = Store(url)
        gateway = RateLimiter(store, "same-name")
        await asyncio.sleep(start_at - time.time())
        count = 67 if number else 66
        answers = await asyncio.gather(
            *(attempt(gateway, tenant(requests_per_min=100, concurrent_requests=90)) for _ in range(count))
        )
        store.close()
        return sum(isinstance(answer, Permit) for answer in answers)

    return asyncio.run(spend())


def test_three_processes_never_pass_more_than_the_limit(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        start_at = time.time() + 4
        running = [pool.submit(spend_in_a_process, store.url, number, start_at) for number in range(3)]
        passed = sum(process.result() for process in running)
    assert 90 - 2 * 4 <= passed <= 90


class AdmissionMachine(RuleBasedStateMachine):
    """Tests that no order of events exceeds a window or the concurrency limit."""

    REQUESTS, TOKENS, PLACES = 12, 300, 5

    def __init__(self, new_database: NewDatabase) -> None:
        super().__init__()
        self.stack = ExitStack()
        url = self.stack.enter_context(new_database())
        self.loop = asyncio.new_event_loop()
        self.gateways = Gateways(url, 2, grace_s=0)
        self.subjects = [
            Subject("tenant", "acme", Limits(self.REQUESTS, self.TOKENS, self.PLACES)),
            Subject("key", "key_1", Limits(requests_per_min=self.REQUESTS + 1)),
        ]
        self.running: list[tuple[Permit, list[float]]] = []
        self.started: list[list[float]] = []  # [start, tokens]

    def teardown(self) -> None:
        self.loop.close()
        self.gateways.close()
        self.stack.close()

    @rule(at=st.integers(0, 1), count=st.integers(1, 4), tokens=st.integers(1, 90))
    def admit(self, at: int, count: int, tokens: int) -> None:
        async def together() -> list[Permit | RateLimited]:
            gateway = self.gateways.all[at]
            return await asyncio.gather(*(attempt(gateway, self.subjects, tokens) for _ in range(count)))

        for answer in self.loop.run_until_complete(together()):
            if isinstance(answer, Permit):
                record = [self.gateways.clock.now, float(tokens)]
                self.started.append(record)
                self.running.append((answer, record))

    @rule(data=st.data(), share=st.floats(0, 1))
    def release(self, data: st.DataObject, share: float) -> None:
        if self.running:
            permit, record = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
            record[1] = int(record[1] * share)
            permit.release(int(record[1]))

    @rule(at=st.integers(0, 1))
    def settle(self, at: int) -> None:
        self.loop.run_until_complete(self.gateways.all[at].settle())

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 4.0]))
    def wait(self, seconds: float) -> None:
        self.gateways.clock.now += seconds
        for gateway in self.gateways.all:  # they live, so they renew
            self.loop.run_until_complete(gateway.settle())

    @rule(seconds=st.sampled_from([30.0, 58.0, 60.0]))
    def wait_long(self, seconds: float) -> None:
        for _ in range(int(seconds // 5)):
            self.wait(5.0)

    @invariant()
    def nothing_is_overshot(self) -> None:
        now = self.gateways.clock.now
        recent = [tokens for start, tokens in self.started if start > now - 60]
        assert len(recent) <= self.REQUESTS
        assert sum(recent) <= self.TOKENS
        assert len(self.running) <= self.PLACES


def test_in_no_order_of_events_is_a_limit_overshot(new_database: NewDatabase) -> None:
    run_state_machine_as_test(
        lambda: AdmissionMachine(new_database), settings=settings(max_examples=20, stateful_step_count=25)
    )
