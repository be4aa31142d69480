"""Computes what a token and what a request cost each process, from the CPU of two loads.

Many short answers are mostly requests, a few long ones mostly tokens: CPU = a × tokens + b × requests.
"""

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.connection import encode_turn
from loadtests.bench.load_generator import closed_loop, run_on_uvloop
from loadtests.bench.overhead import ADAPTERS, QUIET_S, TINY_SLO
from loadtests.bench.processes import Seconds, cpu_used, is_housekeeping
from loadtests.bench.servers import RunningServer, published_adapters, running_servers
from loadtests.bench.tables import markdown
from loadtests.bench.workload import Workload

STREAMS = 16
SHORT = Workload("short", STREAMS, 320, 2, mixed=True, slo=TINY_SLO)
LONG = Workload("long", STREAMS, 32, 256, mixed=True, slo=TINY_SLO)
console = Console(stderr=True)


def measure(home: Path, base: str, *, rounds: int) -> dict[str, Any]:
    """Gives ours and the bare server `rounds` turns of each load. The cost is computed from medians."""
    turns: dict[tuple[str, str], list[Seconds]] = defaultdict(list)
    with (
        published_adapters(home, base, ADAPTERS) as adapters,
        running_servers(home, base, adapters, ()) as servers,
    ):
        for number in range(rounds + 1):
            for batch, workload in ((2 * number, SHORT), (2 * number + 1, LONG)):
                for server in servers:
                    cpu_s = _turn(server, workload, batch)
                    if number:  # the first warms up
                        turns[server.name, workload.name].append(cpu_s)
            console.print(f"round {number} of {rounds}" if number else "warm")
        names = [server.name for server in servers]
    return {
        "base": base, "streams": STREAMS, "rounds": rounds, "adapters": ADAPTERS,
        "answers": {load.name: {"requests": load.requests, "tokens": load.tokens} for load in (SHORT, LONG)},
        "servers": {name: split_cost(turns[name, SHORT.name], turns[name, LONG.name]) for name in names},
    }  # fmt: skip


def _turn(running: RunningServer, workload: Workload, batch: int) -> Seconds:
    requests = encode_turn(running.server, workload, batch)
    time.sleep(QUIET_S)
    before = running.family.read_cpu()
    results = run_on_uvloop(lambda: closed_loop(running.url, requests, STREAMS)).results
    cpu_s = cpu_used(before, running.family.read_cpu())
    if failed := [result for result in results if not result.ok]:
        raise RuntimeError(f"{running.name}: {len(failed)} of {len(results)} failed: {failed[0].error}")
    return cpu_s


def split_cost(short: list[Seconds], long: list[Seconds]) -> dict[str, dict[str, float]]:
    """Returns by process the CPU µs a token and ms a request, from the medians of the turns."""
    tokens, requests = SHORT.requests * SHORT.tokens, SHORT.requests
    tokens_long, requests_long = LONG.requests * LONG.tokens, LONG.requests
    determinant = tokens * requests_long - tokens_long * requests
    cost = {}
    for role in sorted({role for turn in short + long for role in turn}):
        short_s, long_s = (
            statistics.median(turn.get(role, 0.0) for turn in turns) for turns in (short, long)
        )
        cost[role] = {
            "token_us": round(1e6 * (short_s * requests_long - long_s * requests) / determinant, 1),
            "request_ms": round(1e3 * (tokens * long_s - tokens_long * short_s) / determinant, 2),
        }
    return cost


def table(result: dict[str, Any]) -> str:
    """Leaves out Ray's housekeeping, which no request passes through."""
    rows = [
        [server, role, f"{cost['token_us']:.0f}", f"{cost['request_ms']:.2f}"]
        for server, by_role in result["servers"].items()
        for role, cost in sorted(by_role.items(), key=lambda item: -item[1]["request_ms"])
        if not is_housekeeping(role) and max(cost["token_us"], 100 * cost["request_ms"]) >= 1
    ]
    return markdown(["server", "process", "CPU a token, µs", "CPU a request, ms"], rows)
