"""Measures throughput over numbers of gateway and engine replicas, and finds the first limit.

The service is started anew for each size, because memory does not hold several. The sizes are run forwards
and then backwards, so a machine whose speed drifts shows as a spread.
"""

import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from loadtests.bench.bespoke_server import bespoke_server
from loadtests.bench.connection import encode_turn
from loadtests.bench.load_generator import closed_loop, run_on_uvloop
from loadtests.bench.overhead import TINY_SLO
from loadtests.bench.processes import ProcessFamily, cpu_used, is_engine
from loadtests.bench.statistics import spread, summarize, turn_figures
from loadtests.bench.tables import markdown
from loadtests.bench.workload import Workload
from loadtests.peers.server import Server

GATEWAYS, ENGINES = (1, 2, 4), (1, 2)
STREAMS, REQUESTS = 32, 128
GENERATOR = "load generator"
SATURATED = 0.95  # of a core for a process, of all cores for the machine
console = Console(stderr=True)


def measure(home: Path, base: str, *, passes: int, rounds: int) -> dict[str, Any]:
    sizes = [(gateways, engines) for engines in ENGINES for gateways in GATEWAYS]
    turns: dict[tuple[int, int], list[dict[str, Any]]] = {size: [] for size in sizes}
    for number in range(passes):
        for gateways, engines in sizes if number % 2 == 0 else sizes[::-1]:
            with bespoke_server(home, base, {}, gateway_replicas=gateways, engine_replicas=engines) as server:
                turns[gateways, engines] += _rounds(server, rounds)
            _print(gateways, engines, turns[gateways, engines])
    curve = [
        {"gateways": gateways, "engines": engines, **_point(of_size)}
        for (gateways, engines), of_size in turns.items()
    ]
    return {
        "base": base, "streams": STREAMS, "requests_a_round": REQUESTS, "tokens": 64, "passes": passes,
        "rounds": rounds, "curve": curve, "first_limit": first_limit(curve[0]),
    }  # fmt: skip


def _rounds(server: Server, rounds: int) -> list[dict[str, Any]]:
    workload = Workload("scaling", STREAMS, REQUESTS, 64, mixed=False, slo=TINY_SLO)
    family, turns = ProcessFamily((server.root_pid,)), []
    for number in range(rounds + 1):
        requests = encode_turn(server, workload, number)
        before, busy, own_s = family.read_cpu(), psutil.cpu_times(), time.process_time()
        turn = run_on_uvloop(lambda: closed_loop(server.url, requests, STREAMS))  # noqa: B023
        cpu_s = cpu_used(before, family.read_cpu()) | {GENERATOR: time.process_time() - own_s}
        cores = {name: seconds / turn.wall_s for name, seconds in cpu_s.items()}
        if number:  # the first warms up
            figures = turn_figures(turn, workload.slo)
            turns.append(figures | {"cores": cores, "machine_busy": _busy(busy, psutil.cpu_times())})
    return turns


def _busy(before: Any, after: Any) -> float:
    """Returns the part of all cores that was not idle."""
    idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    total = sum(after[:8]) - sum(before[:8])
    return 1 - idle / total if total else 0.0


def _point(turns: list[dict[str, Any]]) -> dict[str, Any]:
    roles = {role for turn in turns for role in turn["cores"]}
    cores = {role: spread([turn["cores"].get(role, 0.0) for turn in turns])["median"] for role in roles}
    shown = {role: share for role, share in sorted(cores.items(), key=lambda item: -item[1]) if share >= 0.01}
    return summarize(turns) | {
        "tokens_per_s_spread": spread([turn["tokens_per_s"] for turn in turns], 1),
        "cores_by_role": shown,
    }


def first_limit(point: dict[str, Any], cores: int | None = None) -> str:
    """Names what is full at the smallest size: one process on its core, the machine, or nothing."""
    by_role, cores = point["cores_by_role"], cores or psutil.cpu_count() or 1
    shares = ", ".join(f"{role} {share:.2f}" for role, share in list(by_role.items())[:4])
    name, most = next(iter(by_role.items()))
    if point["machine_busy"] >= SATURATED:
        around = sum(share for role, share in by_role.items() if not is_engine(role) and role != GENERATOR)
        return f"the machine's {cores} cores are full ({shares}; {around:.2f} are ours around the engine)"
    if most >= SATURATED:
        return f"one {name} process fills its core ({shares})"
    return f"no core is full: the machine is busy to {100 * point['machine_busy']:.0f} % ({shares})"


def table(result: dict[str, Any]) -> str:
    smallest = result["curve"][0]["tokens_per_s"]
    rows = [
        [f"{point['gateways']} × {point['engines']}", f"{point['tokens_per_s']:.0f}",
         f"{point['tokens_per_s'] / smallest:.2f}",
         f"{point['ttft_p50_ms']:.0f} / {point['ttft_p99_ms']:.0f}",
         f"{point['itl_p50_ms']:.0f} / {point['itl_p99_ms']:.0f}", f"{100 * point['machine_busy']:.0f}",
         ", ".join(f"{role} {share:.2f}" for role, share in list(point["cores_by_role"].items())[:4])]
        for point in result["curve"]
    ]  # fmt: skip
    head = ["gateways × engines", "tok/s", "to 1 × 1", "TTFT p50 / p99 ms", "ITL p50 / p99 ms",
            "machine busy, %", "cores used"]  # fmt: skip
    return f"{markdown(head, rows)}\n\nThe first limit: {result['first_limit']}."


def _print(gateways: int, engines: int, turns: list[dict[str, Any]]) -> None:
    point = _point(turns)
    console.print(
        f"{gateways} gateways, {engines} engines: {point['tokens_per_s']:.0f} tok/s, "
        f"machine {100 * point['machine_busy']:.0f} % busy, {point['failed']} failed"
    )
