"""Runs one engine in a process of its own; `loadtests.bench.adapters` sends it commands as JSON lines.

    {"do": "burst", "adapters": [0, null, …], "tokens": 48, "seed": 1}
    {"do": "first_tokens", …}   {"do": "neighbours", …}   {"do": "popular", …}   {"do": "starve", …}

The engine is the one that serves (`serve.engine.vllm.engine.VllmEngine`), without Ray and the gateway, which
`loadtests.bench.overhead` measures.
"""

import asyncio
import contextlib
import json
import os
import random
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from serve.engine.protocol import Delta, Event, GenerationRequest, Message, Sampling
from serve.engine.vllm.engine import VllmEngine
from serve.engine.vllm.setup import compute_on_one_thread
from serve.registry.versions import AdapterVersion
from serve.settings import EngineSettings

TOPICS = (
    "the sea",
    "a mountain",
    "a small town",
    "a journey",
    "a garden",
    "an old clock",
    "winter",
    "a train",
)


@dataclass
class Timing:
    """Holds the arrival times of one request's tokens, in seconds from its start."""

    stamps_s: list[float] = field(default_factory=list)

    @property
    def ttft_s(self) -> float:
        return self.stamps_s[0]


class Driver:
    """Sends greedy requests to one engine and times their tokens."""

    def __init__(self, engine: VllmEngine, adapters: list[AdapterVersion]) -> None:
        self._engine = engine
        self._adapters = adapters
        self._number = 0

    async def request(self, adapter: int | None, tokens: int, seed: int) -> Timing:
        self._number += 1
        text = f"Write a long story, number {seed}, about {TOPICS[seed % len(TOPICS)]}."
        request = GenerationRequest(
            f"bench-{self._number}",
            None if adapter is None else self._adapters[adapter],
            (Message("user", text),),
            Sampling(completion_tokens_max=tokens, temperature=0.0),
            cache_salt=str(self._number),  # no prefix cache: every prompt is computed
        )
        timing, started_s = Timing(), time.perf_counter()

        def take(batch: list[Event]) -> None:
            now_s = time.perf_counter() - started_s
            timing.stamps_s += [now_s] * sum(e.tokens for e in batch if isinstance(e, Delta))

        await self._engine.generate(request, take)
        return timing

    async def burst(self, adapters: list[int | None], tokens: int, seed: int) -> dict[str, Any]:
        """Sends all requests at once. The time includes that of their prompts."""
        started_s = time.perf_counter()
        timings = await asyncio.gather(
            *(self.request(adapter, tokens, seed + i) for i, adapter in enumerate(adapters))
        )
        count = sum(len(timing.stamps_s) for timing in timings)
        return {"tokens": count, "wall_s": time.perf_counter() - started_s}

    async def first_tokens(self, adapters: list[int], seed: int) -> dict[str, Any]:
        """Times each adapter's first token, one request at a time."""
        ttft_s = [(await self.request(adapter, 2, seed + i)).ttft_s for i, adapter in enumerate(adapters)]
        return {"ttft_s": ttft_s}

    async def neighbours(
        self, streams: int, arrivals: list[int], every_s: float, seed: int
    ) -> dict[str, Any]:
        """Times the tokens of `streams` of the base while a request for each of `arrivals` comes in."""
        tokens = 400
        running = [asyncio.create_task(self._watch(tokens, seed + i)) for i in range(streams)]
        await asyncio.sleep(2 * every_s)
        ttft_s, begun_s = [], time.perf_counter()
        for i, adapter in enumerate(arrivals):
            ttft_s.append((await self.request(adapter, 2, seed + 100 + i)).ttft_s)
            await asyncio.sleep(max(0.0, begun_s + (i + 1) * every_s - time.perf_counter()))
        ended_s = time.perf_counter()
        for task in running:
            task.cancel()
        stamps = [await task for task in running]
        gaps = [b - a for times in stamps for a, b in pairwise(times) if begun_s <= a and b <= ended_s]
        return {"ttft_s": ttft_s, "itl_s": gaps}

    async def _watch(self, tokens: int, seed: int) -> list[float]:
        stamps: list[float] = []

        def take(batch: list[Event]) -> None:
            stamps.extend([time.perf_counter()] * sum(isinstance(event, Delta) for event in batch))

        with contextlib.suppress(asyncio.CancelledError):
            while True:
                base_s = time.perf_counter()
                request = GenerationRequest(
                    f"neighbour-{seed}-{base_s}",
                    None,
                    (Message("user", f"Write a long story, number {seed}."),),
                    Sampling(completion_tokens_max=tokens, temperature=0.0),
                    cache_salt=str(seed),
                )
                await self._engine.generate(request, take)
        return stamps

    async def popular(
        self, streams: int, requests: int, tokens: int, population: int, zipf: float, seed: int
    ) -> dict[str, Any]:
        """Runs a closed loop of `streams`; each draws its adapters from `population` by Zipf's law."""
        rng = random.Random(seed)
        weights = [1 / (rank + 1) ** zipf for rank in range(population)]
        drawn = rng.choices(range(population), weights, k=requests)
        left = list(enumerate(drawn))[::-1]
        timings: list[Timing] = []

        async def stream() -> None:
            while left:
                number, adapter = left.pop()
                timings.append(await self.request(adapter, tokens, seed + number))

        started_s = time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(streams)))
        return {
            "tokens": sum(len(timing.stamps_s) for timing in timings),
            "wall_s": time.perf_counter() - started_s,
            "distinct": len(set(drawn)),
            "worst_ttft_s": max(timing.ttft_s for timing in timings),
            "worst_slot_wait_s": await self._worst_wait(),
        }

    async def starve(self, hot: list[int], cold: list[int], tokens: int, seed: int) -> dict[str, Any]:
        """Fills every slot with two endless streams per hot adapter, and times how long a cold one waits."""
        ended = asyncio.Event()

        async def endless(adapter: int, offset: int) -> None:
            number = 0
            while not ended.is_set():
                number += 1
                await self.request(adapter, tokens, seed + offset + 1000 * number)

        hots = [asyncio.create_task(endless(a, i)) for i, a in enumerate([*hot, *hot])]
        await asyncio.sleep(2)
        waits = [(await self.request(adapter, 2, seed + i)).ttft_s for i, adapter in enumerate(cold)]
        ended.set()
        await asyncio.gather(*hots)
        return {"cold_ttft_s": waits, "worst_slot_wait_s": await self._worst_wait()}

    async def _worst_wait(self) -> float:
        residency = (await self._engine.counters()).residency
        return residency.wait_s_max


async def main() -> None:
    order = json.loads(sys.stdin.readline())
    adapters_dir = Path(order["adapters_dir"])
    adapters = [AdapterVersion(number + 1, *parts) for number, parts in enumerate(order["adapters"])]
    # vLLM writes to standard output, so results go to a copy of it that nobody else writes to.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = await VllmEngine.start(
        order["base"], Path(order["base_dir"]), adapters_dir, EngineSettings(**order["engine"]), "bench"
    )
    compute_on_one_thread()  # as the replica does
    driver = Driver(engine, adapters)

    def write(result: dict[str, Any]) -> None:
        results.write(json.dumps(result) + "\n")
        results.flush()

    write({"ready": True})
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        write(await getattr(driver, command.pop("do"))(**command))
    engine.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
