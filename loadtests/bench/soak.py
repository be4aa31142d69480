"""Half an hour of steady load: is anything growing?"""

import math
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console

from loadtests.bench.connection import requests_of
from loadtests.bench.disk import Disk
from loadtests.bench.figures import figures, slope
from loadtests.bench.front import ADAPTERS, TINY_SLO
from loadtests.bench.group import published
from loadtests.bench.load import closed, opened, run
from loadtests.bench.ours import ours
from loadtests.bench.processes import Family
from loadtests.bench.tables import markdown
from loadtests.bench.work import Work
from loadtests.peers.server import Server

LOAD = 0.5  # of what a closed loop of 16 reaches
SETTLING = 3  # minutes at the start that do not count: caches fill
END = 5  # minutes of which the median stands for the start and for the end
LATE = 10  # minutes at the end by which everything that has a bound should have reached it
STALL_MS = 100
LATENCIES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
console = Console(stderr=True)


def measure(home: Path, base: str, *, minutes: int, seed: int) -> dict[str, Any]:
    with published(home, base, ADAPTERS) as adapters, ours(home, base, adapters) as server, Disk() as disk:
        family, per_s, told = Family((server.root_pid,)), LOAD * _capacity(server), []
        disk.worst_ms()
        for minute in range(1, minutes + 1):
            count = math.ceil(60 * per_s)
            work = Work("soak", 0, count, 64, mixed=True, slo=TINY_SLO)
            requests = requests_of(server, work, minute)
            taken = figures(run(lambda: opened(server.url, requests, per_s, seed + minute)), work.slo)  # noqa: B023
            told.append(taken | {"memory_mb": family.memory_mb(), "fsync_worst_ms": disk.worst_ms()})
            console.print(
                f"minute {minute}: TTFT p50 {taken['ttft_p50_ms']:.0f} ms, p99 {taken['ttft_p99_ms']:.0f}, "
                f"{taken['failed']} failed, {sum(told[-1]['memory_mb'].values())} MB, "
                f"fsync at worst {told[-1]['fsync_worst_ms']:.0f} ms"
            )
    return {"base": base, "minutes": minutes, "arrivals_per_s": round(per_s, 2), "seed": seed,
            "trend": trend(told), "by_minute": told}  # fmt: skip


def trend(told: list[dict[str, Any]]) -> dict[str, Any]:
    """After the settling minutes: medians of the first and the last five, and the slope of all, an hour.

    MB by process, ms for the latencies. `stalled` are minutes with a TTFT p99 over STALL_MS, `with_disk`
    those of them in which the disk took as long for a page.
    """
    steady = told[SETTLING:] if len(told) > SETTLING + 1 else told
    roles = {role for minute in steady for role in minute["memory_mb"]}
    by_role = {r: round(60 * slope([m["memory_mb"].get(r, 0) for m in steady]), 1) for r in sorted(roles)}
    whole = [sum(minute["memory_mb"].values()) for minute in steady]
    stalled = [minute for minute in steady if minute["ttft_p99_ms"] > STALL_MS]
    return {
        "requests": sum(round(m["requests_per_s"] * m["wall_s"]) for m in told),
        "failed": sum(minute["failed"] for minute in told),
        "memory_mb": _ends(whole),
        "memory_mb_per_hour_by_role": by_role,
        "memory_mb_per_hour_late": round(60 * slope(whole[-LATE:]), 1),
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


def table(told: dict[str, Any]) -> str:
    trend = told["trend"]
    rows = [
        [name, f"{trend[name]['first']:.1f}", f"{trend[name]['last']:.1f}", f"{trend[name]['per_hour']:+.1f}"]
        for name in ("memory_mb", *LATENCIES, "fsync_worst_ms")
    ]
    grown = sorted(trend["memory_mb_per_hour_by_role"].items(), key=lambda item: -item[1])[:3]
    said = f"{told['minutes']} minutes, {trend['requests']} requests (Poisson, {told['arrivals_per_s']} a "
    said += f"second), {trend['failed']} failed; the first {SETTLING} minutes do not count. "
    said += (
        f"Minutes with a TTFT p99 over {STALL_MS} ms: {trend['stalled']}; in {trend['with_disk']} of them "
    )
    said += f"an fsync of a page of the bench's own, beside the service's, took over {STALL_MS} ms too. "
    said += "Memory by process, MB an hour: " + ", ".join(f"{role} {mb:+.1f}" for role, mb in grown) + "; "
    said += f"all, over the last {LATE} minutes: {trend['memory_mb_per_hour_late']:+.1f}.\n\n"
    ends = f"median of {END} minutes"
    return said + markdown(["", f"first: {ends}", f"last: {ends}", "slope an hour"], rows)


def _capacity(server: Server) -> float:
    work = Work("capacity", 16, 64, 64, mixed=True, slo=TINY_SLO)
    for batch in (9001, 9002):  # the first warms up
        requests = requests_of(server, work, batch)
        taken = figures(run(lambda: closed(server.url, requests, work.streams)), work.slo)  # noqa: B023
    return float(taken["requests_per_s"])
