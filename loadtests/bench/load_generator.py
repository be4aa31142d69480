"""Generates load: in a closed loop, in an open loop, or one request at a time to each server in turn."""

import asyncio
import random
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import uvloop

from loadtests.bench.connection import ConnectionPool, StreamResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TurnResult:
    """Holds the results of one turn. `wall_s` ends with the last byte of the last answer."""

    results: list[StreamResult]
    wall_s: float


def run_on_uvloop(task: Callable[[], Awaitable[T]]) -> T:
    """Runs a task on an event loop of its own: uvloop's, because it costs the least CPU.

    SIGTERM ends the process from here, too: uvloop swallows what a handler raises within its callbacks.
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


async def closed_loop(url: str, requests: Sequence[bytes], streams: int) -> TurnResult:
    """Runs `streams` clients; each sends its next request when it has read an answer to its end."""
    pool, left, results = ConnectionPool(url), list(reversed(requests)), []

    async def client() -> None:
        while left:
            results.append(await pool.send(left.pop()))

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    wall_s = time.perf_counter() - started_s
    pool.close()
    return TurnResult(results, wall_s)


async def open_loop(url: str, requests: Sequence[bytes], per_s: float, seed: int) -> TurnResult:
    """Sends requests at Poisson arrival times, however many are still unanswered."""
    pool, rng, tasks = ConnectionPool(url), random.Random(seed), []
    started_s = due_s = time.perf_counter()
    for request in requests:
        due_s += rng.expovariate(per_s)
        await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
        tasks.append(asyncio.create_task(pool.send(request)))
    results = list(await asyncio.gather(*tasks))
    wall_s = time.perf_counter() - started_s
    pool.close()
    return TurnResult(results, wall_s)


async def blocks_in_turn(
    urls: Sequence[str], requests: Sequence[Sequence[bytes]], block: int, quiet_s: float
) -> list[list[StreamResult]]:
    """Sends one request at a time, a block of them to each server in turn, `quiet_s` before each block.

    `requests` has a list for each server. The first of a block wakes its server up and does not count.
    """
    pools = [ConnectionPool(url) for url in urls]
    results: list[list[StreamResult]] = [[] for _ in urls]
    for begin in range(0, len(requests[0]), block):
        for pool, of_server, counted in zip(pools, requests, results, strict=True):
            await asyncio.sleep(quiet_s)
            of_block = [await pool.send(request) for request in of_server[begin : begin + block]]
            counted += of_block[1:]
    for pool in pools:
        pool.close()
    return results
