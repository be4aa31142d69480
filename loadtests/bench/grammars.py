"""Measures what one tenant's costly schemas do to another tenant's first tokens, in one engine.

python -m loadtests.bench.grammars BASE_DIR [--turns 3] [--seconds 20]

Turns without and with the attacker alternate, so a change of the machine touches both. The victim sends a
plain chat and one with a small grammar that is known, in turn. The attacker keeps as many requests in the
engine as one tenant may have grammars waiting, each with a schema of its own: most about as dear as what
still compiles in time, each fourth as dear as the budget lets it be. Without Ray and the gateway, as
`loadtests.bench.adapters`.
"""

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtests.bench.statistics import ms, quantile
from serve.engine.protocol import Delta, Event, GenerationRequest, JsonFormat, Message, Sampling
from serve.engine.vllm.engine import VllmEngine
from serve.engine.vllm.grammar_gate import WAITING_MAX
from serve.engine.vllm.setup import compute_on_one_thread
from serve.errors import BespokeError
from serve.formats.schema_budget import Schema, check_schemas
from serve.settings import EngineSettings

HELLO = (Message("user", "Tell me about the sea."),)
KNOWN = {"type": "object", "properties": {"k": {"type": "string", "maxLength": 3}}, "required": ["k"]}
TOKENS = 8
PAUSE_S, SETTLE_S = 0.05, 5.0

_numbers = itertools.count()


async def ttft(engine: VllmEngine, tenant: str, schema: dict[str, Any] | None) -> float:
    """Sends one request and returns the seconds until its first tokens."""
    number, begun_s, first_s = f"r{next(_numbers)}", time.perf_counter(), 0.0
    format = None if schema is None else JsonFormat(json.dumps(schema))

    def take(events: list[Event]) -> None:
        nonlocal first_s
        if not first_s and any(isinstance(event, Delta) and event.tokens for event in events):
            first_s = time.perf_counter() - begun_s

    sampling = Sampling(completion_tokens_max=TOKENS, temperature=0.0, format=format)
    await engine.generate(GenerationRequest(number, None, HELLO, sampling, tenant), take)
    return first_s


async def attack(engine: VllmEngine, ends_s: float, answers: Counter[str]) -> None:
    while time.perf_counter() < ends_s:
        number = next(_numbers)
        lengths = [128 + number % 800, 129, 130][: 1 if number % 4 else 3]
        properties = {f"{number}-{most}": {"type": "string", "maxLength": most} for most in lengths}
        schema = {"type": "object", "properties": properties}
        check_schemas([Schema("response_format", schema)])
        try:
            await ttft(engine, "attacker", schema)
            answers["answered"] += 1
        except BespokeError as error:
            answers[str(getattr(error, "code", None) or type(error).__name__)] += 1
            await asyncio.sleep(PAUSE_S)


async def turn(engine: VllmEngine, seconds: float, attackers: int) -> dict[str, Any]:
    ends_s = time.perf_counter() + seconds
    answers: Counter[str] = Counter()
    attacking = [asyncio.create_task(attack(engine, ends_s, answers)) for _ in range(attackers)]
    plain_s, known_s = [], []
    while time.perf_counter() < ends_s:
        plain_s.append(await ttft(engine, "victim", None))
        known_s.append(await ttft(engine, "victim", KNOWN))
        await asyncio.sleep(PAUSE_S)
    for task in attacking:
        task.cancel()
    await asyncio.gather(*attacking, return_exceptions=True)
    return {"plain_s": plain_s, "known_s": known_s, "attacker": answers}


async def measure(base_dir: Path, *, turns: int, seconds: float) -> dict[str, Any]:
    settings = EngineSettings(dtype="float32", max_model_len=1024, max_loras=0, enforce_eager=True)
    with tempfile.TemporaryDirectory() as adapters:
        engine = await VllmEngine.start("tiny", base_dir, Path(adapters), settings, "bench")
        try:
            await turn(engine, 3, 0)
            quiet, busy = [], []
            for _ in range(turns):
                quiet.append(await turn(engine, seconds, 0))
                busy.append(await turn(engine, seconds, WAITING_MAX))
                await asyncio.sleep(SETTLE_S)
            counts = engine._grammar_gate.counts
        finally:
            engine.shutdown()
    return {
        "cpus": os.cpu_count(), "load_average": os.getloadavg(), "turns": turns, "seconds": seconds,
        "without": figures(quiet), "with": figures(busy),
        "attacker": dict(sum((each["attacker"] for each in busy), Counter())),
        "new_grammars": sum(counts.buckets), "too_complex": counts.too_complex,
        "cpu_s": round(counts.cpu_s, 1),
    }  # fmt: skip


def figures(turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    rows: dict[str, float] = {}
    for kind in ("plain", "known"):
        values = [value for each in turns for value in each[f"{kind}_s"]]
        rows[f"{kind}_requests"] = len(values)
        rows |= {f"{kind}_ttft_p{p}_ms": ms(quantile(values, p)) for p in (50, 90, 99)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench.grammars")
    parser.add_argument("base_dir", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20.0)
    options = parser.parse_args()
    compute_on_one_thread()
    result = asyncio.run(measure(options.base_dir, turns=options.turns, seconds=options.seconds))
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
