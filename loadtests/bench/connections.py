"""Measures an ordinary client's latency beside a thousand idle connections and five hundred slow readers."""

from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.bespoke_server import bespoke_server
from loadtests.bench.connection import ConnectionPool, StreamResult, encode_request
from loadtests.bench.idle_clients import idle_clients
from loadtests.bench.load_generator import run_on_uvloop
from loadtests.bench.processes import ProcessFamily
from loadtests.bench.statistics import added_latency, ms, quantile
from loadtests.bench.tables import markdown
from loadtests.bench.workload import body, prompt
from loadtests.peers.server import Server

IDLE, SLOW = 1000, 500
TOKENS = 16
SEED = 1
console = Console(stderr=True)


def measure(home: Path, base: str, *, requests: int, idle: int = IDLE, slow: int = SLOW) -> dict[str, Any]:
    with bespoke_server(home, base, {}) as server:
        family = ProcessFamily((server.root_pid,))
        result = run_on_uvloop(lambda: _measure(server, family, requests, idle, slow))
    return {
        "base": base,
        "requests_a_phase": requests,
        "idle": idle,
        "slow_readers": slow,
        "seed": SEED,
    } | result


async def _measure(
    server: Server, family: ProcessFamily, requests: int, idle: int, slow: int
) -> dict[str, Any]:
    """Measures alone, beside the others, and alone again: what returns to its first value has not leaked."""
    await _ordinary(server, requests // 4, 0)  # warm-up
    alone, memory = await _ordinary(server, requests, 1), family.memory_mb()
    async with idle_clients(server, idle, slow) as others:
        at_start = others.counts()
        console.print(f"beside: {at_start}")
        beside, crowded_memory = await _ordinary(server, requests, 2), family.memory_mb()
        at_end = others.counts()
        refusals = sorted(set(others.refusals))[:3]
    after = await _ordinary(server, requests, 3)
    phases = {"alone": alone, "beside": beside, "after": after}
    figures = {name: _phase(results) for name, results in phases.items()}
    alone_s, beside_s = [a.ttft_s for a in alone if a.ok], [a.ttft_s for a in beside if a.ok]
    for name, of_phase in figures.items():
        console.print(f"{name}: {of_phase}")
    return {
        "phases": figures,
        "added_ttft_p50": added_latency(beside_s, alone_s, 50, SEED),
        "added_ttft_p99": added_latency(beside_s, alone_s, 99, SEED),
        "begun": at_start,
        "open_at_the_end": at_end,
        "refusals": refusals,
        "memory_mb": {"alone": memory, "beside": crowded_memory},
    }


async def _ordinary(server: Server, count: int, batch: int) -> list[StreamResult]:
    pool, results = ConnectionPool(server.url), []
    for number in range(count):
        fields = body(server.model, prompt(batch, number), tokens=TOKENS)
        results.append(await pool.send(encode_request(server.url, server.key, fields)))
    pool.close()
    return results


def _phase(results: list[StreamResult]) -> dict[str, Any]:
    answered = [result for result in results if result.ok]
    return {
        "requests": len(results),
        "failed": len(results) - len(answered),
        **{f"ttft_p{p}_ms": ms(quantile([a.ttft_s for a in answered], p)) for p in (50, 90, 99)},
        **{f"whole_p{p}_ms": ms(quantile([a.ended_s - a.sent_s for a in answered], p)) for p in (50, 99)},
    }


def table(result: dict[str, Any]) -> str:
    rows = [
        [name, str(phase["requests"]), str(phase["failed"]),
         f"{phase['ttft_p50_ms']:.1f} / {phase['ttft_p90_ms']:.1f} / {phase['ttft_p99_ms']:.1f}",
         f"{phase['whole_p50_ms']:.1f} / {phase['whole_p99_ms']:.1f}"]
        for name, phase in result["phases"].items()
    ]  # fmt: skip
    at_start, at_end = result["begun"], result["open_at_the_end"]
    before, beside = (sum(result["memory_mb"][phase].values()) for phase in ("alone", "beside"))
    text = f"\n\nBeside: {at_start['idle']} idle keep-alive connections ({at_end['idle']} at the end) and "
    text += f"{at_start['slow_readers']} slow readers ({at_end['slow_readers']}); "
    text += f"{at_end['refused']} were refused. "
    text += f"Memory of all processes: {before} MB alone, {beside} MB beside them."
    return markdown(["", "requests", "failed", "TTFT p50 / p90 / p99 ms", "whole p50 / p99 ms"], rows) + text
