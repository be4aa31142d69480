"""The load generator: closed loop, open loop, and one request at a time in turns."""

import asyncio
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import uvloop

from loadtests.bench.connection import Answer, Pool

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Run:
    """All answers of one turn, and how long it took from the first request to the last answer's end."""

    answers: list[Answer]
    wall_s: float


def run(task: Callable[[], Awaitable[T]]) -> T:
    """On a loop of its own; uvloop's, because the load must cost as little as it can.

    SIGTERM ends the process from here too: uvloop swallows what a handler raises within one of its callbacks.
    """
    before = signal.getsignal(signal.SIGTERM)

    async def main() -> T:
        current = asyncio.current_task()
        assert current is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, current.cancel)
        return await task()

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


async def closed(url: str, requests: Sequence[bytes], streams: int) -> Run:
    """`streams` clients that each send the next request when they have read an answer to its end."""
    pool, left, answers = Pool(url), list(reversed(requests)), []

    async def client() -> None:
        while left:
            answers.append(await pool.ask(left.pop()))

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    wall_s = time.perf_counter() - started_s
    pool.close()
    return Run(answers, wall_s)


async def opened(url: str, requests: Sequence[bytes], per_s: float, seed: int) -> Run:
    """Poisson arrivals: a request is sent at its time, however many are still unanswered."""
    pool, rng, tasks = Pool(url), random.Random(seed), []
    started_s = due_s = time.perf_counter()
    for request in requests:
        due_s += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(pool.ask(request)))
    answers = list(await asyncio.gather(*tasks))
    wall_s = time.perf_counter() - started_s
    pool.close()
    return Run(answers, wall_s)


async def alternating(
    urls: Sequence[str], requests: Sequence[Sequence[bytes]], block: int, quiet_s: float
) -> list[list[Answer]]:
    """One request at a time, a block of them to each server in turn, `quiet_s` before each block.

    `requests` has a list for each server. The first of a block wakes its server up and is left out.
    """
    pools = [Pool(url) for url in urls]
    answers: list[list[Answer]] = [[] for _ in urls]
    for begin in range(0, len(requests[0]), block):
        for pool, mine, told in zip(pools, requests, answers, strict=True):
            await asyncio.sleep(quiet_s)
            taken = [await pool.ask(request) for request in mine[begin : begin + block]]
            told += taken[1:]
    for pool in pools:
        pool.close()
    return answers
