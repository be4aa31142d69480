"""Gateway and engine replicas: the curve, and what the first limit is.

Each size is a start of its own, because memory does not hold them beside each other; the sizes are passed
forwards and then backwards, so that a machine that drifts shows as a spread.
"""

import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from loadtests.bench.connection import requests_of
from loadtests.bench.figures import figures, over, spread
from loadtests.bench.front import TINY_SLO
from loadtests.bench.load import closed, run
from loadtests.bench.ours import ours
from loadtests.bench.processes import Family, is_engine, used
from loadtests.bench.tables import markdown
from loadtests.bench.work import Work
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
            with ours(home, base, {}, gateway_replicas=gateways, engine_replicas=engines) as server:
                turns[gateways, engines] += _rounds(server, rounds)
            _tell(gateways, engines, turns[gateways, engines])
    curve = [
        {"gateways": gateways, "engines": engines, **_point(taken)}
        for (gateways, engines), taken in turns.items()
    ]
    return {
        "base": base, "streams": STREAMS, "requests_a_round": REQUESTS, "tokens": 64, "passes": passes,
        "rounds": rounds, "curve": curve, "first_limit": first_limit(curve[0]),
    }  # fmt: skip


def _rounds(server: Server, rounds: int) -> list[dict[str, Any]]:
    work = Work("scaling", STREAMS, REQUESTS, 64, mixed=False, slo=TINY_SLO)
    family, taken = Family((server.root_pid,)), []
    for number in range(rounds + 1):
        requests = requests_of(server, work, number)
        before, busy, own_s = family.moment(), psutil.cpu_times(), time.process_time()
        one = run(lambda: closed(server.url, requests, STREAMS))  # noqa: B023
        cpu_s = used(before, family.moment()) | {GENERATOR: time.process_time() - own_s}
        cores = {name: seconds / one.wall_s for name, seconds in cpu_s.items()}
        if number:  # the first warms up
            told = figures(one, work.slo)
            taken.append(told | {"cores": cores, "machine_busy": _busy(busy, psutil.cpu_times())})
    return taken


def _busy(before: Any, after: Any) -> float:
    """The part of all cores that was not idle."""
    idle = (after.idle + after.iowait) - (before.idle + before.iowait)
    total = sum(after[:8]) - sum(before[:8])
    return 1 - idle / total if total else 0.0


def _point(taken: list[dict[str, Any]]) -> dict[str, Any]:
    roles = {role for turn in taken for role in turn["cores"]}
    cores = {role: spread([turn["cores"].get(role, 0.0) for turn in taken])["median"] for role in roles}
    shown = {role: used for role, used in sorted(cores.items(), key=lambda item: -item[1]) if used >= 0.01}
    return over(taken) | {
        "tokens_per_s_spread": spread([turn["tokens_per_s"] for turn in taken], 1),
        "cores_by_role": shown,
    }


def first_limit(point: dict[str, Any], cores: int | None = None) -> str:
    """What is full at the smallest size: one process on its one core, or the machine."""
    by_role, cores = point["cores_by_role"], cores or psutil.cpu_count() or 1
    shares = ", ".join(f"{role} {share:.2f}" for role, share in list(by_role.items())[:4])
    name, most = next(iter(by_role.items()))
    if point["machine_busy"] >= SATURATED:
        around = sum(share for role, share in by_role.items() if not is_engine(role) and role != GENERATOR)
        return f"the machine's {cores} cores are full ({shares}; {around:.2f} are ours around the engine)"
    if most >= SATURATED:
        return f"one {name} process fills its core ({shares})"
    return f"no core is full: the machine is busy to {100 * point['machine_busy']:.0f} % ({shares})"


def table(told: dict[str, Any]) -> str:
    one = told["curve"][0]["tokens_per_s"]
    rows = [
        [f"{point['gateways']} × {point['engines']}", f"{point['tokens_per_s']:.0f}",
         f"{point['tokens_per_s'] / one:.2f}", f"{point['ttft_p50_ms']:.0f} / {point['ttft_p99_ms']:.0f}",
         f"{point['itl_p50_ms']:.0f} / {point['itl_p99_ms']:.0f}", f"{100 * point['machine_busy']:.0f}",
         ", ".join(f"{role} {share:.2f}" for role, share in list(point["cores_by_role"].items())[:4])]
        for point in told["curve"]
    ]  # fmt: skip
    head = ["gateways × engines", "tok/s", "to 1 × 1", "TTFT p50 / p99 ms", "ITL p50 / p99 ms",
            "machine busy, %", "cores used"]  # fmt: skip
    return f"{markdown(head, rows)}\n\nThe first limit: {told['first_limit']}."


def _tell(gateways: int, engines: int, taken: list[dict[str, Any]]) -> None:
    point = _point(taken)
    console.print(
        f"{gateways} gateways, {engines} engines: {point['tokens_per_s']:.0f} tok/s, "
        f"machine {100 * point['machine_busy']:.0f} % busy, {point['failed']} failed"
    )
