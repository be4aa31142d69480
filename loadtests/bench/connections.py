"""A thousand idle connections and five hundred slow readers, and what an ordinary client notices of them."""

from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.connection import Answer, Pool, encoded
from loadtests.bench.crowd import crowd
from loadtests.bench.figures import added, ms, quantile
from loadtests.bench.load import run
from loadtests.bench.ours import ours
from loadtests.bench.processes import Family
from loadtests.bench.tables import markdown
from loadtests.bench.work import body, prompt
from loadtests.peers.server import Server

IDLE, SLOW = 1000, 500
TOKENS = 16
SEED = 1
console = Console(stderr=True)


def measure(home: Path, base: str, *, requests: int, idle: int = IDLE, slow: int = SLOW) -> dict[str, Any]:
    with ours(home, base, {}) as server:
        family = Family((server.root_pid,))
        told = run(lambda: _measure(server, family, requests, idle, slow))
    return {
        "base": base,
        "requests_a_phase": requests,
        "idle": idle,
        "slow_readers": slow,
        "seed": SEED,
    } | told


async def _measure(server: Server, family: Family, requests: int, idle: int, slow: int) -> dict[str, Any]:
    """Without, with, and again without: what comes back to where it was has not leaked."""
    await _ordinary(server, requests // 4, 0)  # warm-up
    alone, memory = await _ordinary(server, requests, 1), family.memory_mb()
    async with crowd(server, idle, slow) as others:
        begun = others.standing()
        console.print(f"beside: {begun}")
        beside, crowded_memory = await _ordinary(server, requests, 2), family.memory_mb()
        still = others.standing()
        refusals = sorted(set(others.refusals))[:3]
    after = await _ordinary(server, requests, 3)
    phases = {"alone": alone, "beside": beside, "after": after}
    told = {name: _phase(taken) for name, taken in phases.items()}
    alone_s, beside_s = [a.ttft_s for a in alone if a.ok], [a.ttft_s for a in beside if a.ok]
    for name, one in told.items():
        console.print(f"{name}: {one}")
    return {
        "phases": told,
        "added_ttft_p50": added(beside_s, alone_s, 50, SEED),
        "added_ttft_p99": added(beside_s, alone_s, 99, SEED),
        "begun": begun,
        "open_at_the_end": still,
        "refusals": refusals,
        "memory_mb": {"alone": memory, "beside": crowded_memory},
    }


async def _ordinary(server: Server, count: int, batch: int) -> list[Answer]:
    pool, answers = Pool(server.url), []
    for number in range(count):
        asked = body(server.model, prompt(batch, number), tokens=TOKENS)
        answers.append(await pool.ask(encoded(server.url, server.key, asked)))
    pool.close()
    return answers


def _phase(answers: list[Answer]) -> dict[str, Any]:
    answered = [answer for answer in answers if answer.ok]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(answered),
        **{f"ttft_p{p}_ms": ms(quantile([a.ttft_s for a in answered], p)) for p in (50, 90, 99)},
        **{f"whole_p{p}_ms": ms(quantile([a.ended_s - a.sent_s for a in answered], p)) for p in (50, 99)},
    }


def table(told: dict[str, Any]) -> str:
    rows = [
        [name, str(one["requests"]), str(one["failed"]),
         f"{one['ttft_p50_ms']:.1f} / {one['ttft_p90_ms']:.1f} / {one['ttft_p99_ms']:.1f}",
         f"{one['whole_p50_ms']:.1f} / {one['whole_p99_ms']:.1f}"]
        for name, one in told["phases"].items()
    ]  # fmt: skip
    begun, still = told["begun"], told["open_at_the_end"]
    before, beside = (sum(told["memory_mb"][phase].values()) for phase in ("alone", "beside"))
    said = f"\n\nBeside: {begun['idle']} idle keep-alive connections ({still['idle']} at the end) and "
    said += (
        f"{begun['slow_readers']} slow readers ({still['slow_readers']}); {still['refused']} were refused. "
    )
    said += f"Memory of all processes: {before} MB alone, {beside} MB beside them."
    return markdown(["", "requests", "failed", "TTFT p50 / p90 / p99 ms", "whole p50 / p99 ms"], rows) + said
