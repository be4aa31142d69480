"""Runs half an hour of steady load and fits memory and latency to see whether they grow."""

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.bespoke_server import bespoke_server
from loadtests.bench.connection import encode_turn
from loadtests.bench.disk import DiskProbe
from loadtests.bench.load_generator import closed_loop, open_loop, run_on_uvloop
from loadtests.bench.overhead import ADAPTERS, TINY_SLO
from loadtests.bench.processes import ProcessFamily
from loadtests.bench.servers import published_adapters
from loadtests.bench.statistics import slope, turn_figures
from loadtests.bench.tables import markdown
from loadtests.bench.workload import Workload
from loadtests.peers.server import Server

LOAD = 0.5  # of the requests/s that a closed loop of 16 streams reaches
SETTLING = 3  # minutes at the start that do not count: caches fill
END = 5  # the start and the end are medians of so many minutes
LATE = 10  # last minutes: what has a bound should have reached it by then
STALL_MS = 100
LATENCIES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
console = Console(stderr=True)


def measure(home: Path, base: str, *, minutes: int, seed: int) -> dict[str, Any]:
    with (
        published_adapters(home, base, ADAPTERS) as adapters,
        bespoke_server(home, base, adapters) as server,
        DiskProbe() as disk,
    ):
        family, per_s, by_minute = ProcessFamily((server.root_pid,)), LOAD * _capacity(server), []
        disk.worst_ms()
        for minute in range(1, minutes + 1):
            count = math.ceil(60 * per_s)
            workload = Workload("soak", 0, count, 64, mixed=True, slo=TINY_SLO)
            requests = encode_turn(server, workload, minute)
            turn = run_on_uvloop(lambda: open_loop(server.url, requests, per_s, seed + minute))  # noqa: B023
            figures = turn_figures(turn, workload.slo)
            figures |= {"memory_mb": family.memory_mb(), "fsync_worst_ms": disk.worst_ms()}
            by_minute.append(figures)
            console.print(
                f"minute {minute}: TTFT p50 {figures['ttft_p50_ms']:.0f} ms, "
                f"p99 {figures['ttft_p99_ms']:.0f}, "
                f"{figures['failed']} failed, {sum(figures['memory_mb'].values())} MB, "
                f"fsync at worst {figures['fsync_worst_ms']:.0f} ms"
            )
    return {"base": base, "minutes": minutes, "arrivals_per_s": round(per_s, 2), "seed": seed,
            "trend": trend(by_minute), "by_minute": by_minute}  # fmt: skip


def trend(by_minute: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns medians of the first and the last END minutes after SETTLING, and the slope an hour of all.

    Memory is in MB by process, latencies in ms. `stalled` counts minutes with a TTFT p99 over STALL_MS;
    `with_disk` counts those of them in which an fsync took as long.
    """
    steady = by_minute[SETTLING:] if len(by_minute) > SETTLING + 1 else by_minute
    roles = {role for minute in steady for role in minute["memory_mb"]}
    by_role = {r: round(60 * slope([m["memory_mb"].get(r, 0) for m in steady]), 1) for r in sorted(roles)}
    total_mb = [sum(minute["memory_mb"].values()) for minute in steady]
    stalled = [minute for minute in steady if minute["ttft_p99_ms"] > STALL_MS]
    return {
        "requests": sum(round(m["requests_per_s"] * m["wall_s"]) for m in by_minute),
        "failed": sum(minute["failed"] for minute in by_minute),
        "memory_mb": _ends(total_mb),
        "memory_mb_per_hour_by_role": by_role,
        "memory_mb_per_hour_late": round(60 * slope(total_mb[-LATE:]), 1),
        **{name: _ends([minute[name] for minute in steady]) for name in LATENCIES},
        "stalled": len(stalled),
        "with_disk": sum(minute["fsync_worst_ms"] > STALL_MS for minute in stalled),
        "fsync_worst_ms": _ends([minute["fsync_worst_ms"] for minute in steady]),
    }


def _ends(values: list[float]) -> dict[str, float]:
    return {
        "first": round(statistics.median(values[:END]), 2),
        "last": round(statistics.median(values[-END:]), 2),
        "per_hour": round(60 * slope(values), 2),
    }


def table(result: dict[str, Any]) -> str:
    trend = result["trend"]
    rows = [
        [name, f"{trend[name]['first']:.1f}", f"{trend[name]['last']:.1f}", f"{trend[name]['per_hour']:+.1f}"]
        for name in ("memory_mb", *LATENCIES, "fsync_worst_ms")
    ]
    grown = sorted(trend["memory_mb_per_hour_by_role"].items(), key=lambda item: -item[1])[:3]
    text = (
        f"{result['minutes']} minutes, {trend['requests']} requests (Poisson, {result['arrivals_per_s']} a "
    )
    text += f"second), {trend['failed']} failed; the first {SETTLING} minutes do not count. "
    text += (
        f"Minutes with a TTFT p99 over {STALL_MS} ms: {trend['stalled']}; in {trend['with_disk']} of them "
    )
    text += f"an fsync of a page of the bench's own, beside the service's, took over {STALL_MS} ms too. "
    text += "Memory by process, MB an hour: " + ", ".join(f"{role} {mb:+.1f}" for role, mb in grown) + "; "
    text += f"all, over the last {LATE} minutes: {trend['memory_mb_per_hour_late']:+.1f}.\n\n"
    ends = f"median of {END} minutes"
    return text + markdown(["", f"first: {ends}", f"last: {ends}", "slope an hour"], rows)


def _capacity(server: Server) -> float:
    """Returns the requests/s that a closed loop of 16 streams reaches."""
    workload = Workload("capacity", 16, 64, 64, mixed=True, slo=TINY_SLO)
    for batch in (9001, 9002):  # the first warms up
        requests = encode_turn(server, workload, batch)
        turn = run_on_uvloop(lambda: closed_loop(server.url, requests, workload.streams))  # noqa: B023
    return float(turn_figures(turn, workload.slo)["requests_per_s"])
