"""Measures what a scrape of /metrics costs the service: time, size, and the CPU of all its processes."""

import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from loadtests.bench.bespoke_server import bespoke_server
from loadtests.bench.connection import encode_turn
from loadtests.bench.load_generator import closed_loop, run_on_uvloop
from loadtests.bench.overhead import ADAPTERS, IDLE_SETTLE_S, TINY_SLO
from loadtests.bench.processes import ProcessFamily, cpu_used
from loadtests.bench.servers import published_adapters
from loadtests.bench.tables import markdown
from loadtests.bench.workload import Workload

GATEWAYS, ENGINES = 2, 1
IDLE_S = 20.0


def measure(home: Path, base: str, *, scrapes: int) -> dict[str, Any]:
    """Scrapes a service without requests that has served every adapter. Its idle CPU is subtracted."""
    workload = Workload("scrape", 16, 64, 16, mixed=True, slo=TINY_SLO)
    with (
        published_adapters(home, base, ADAPTERS) as adapters,
        bespoke_server(home, base, adapters, gateway_replicas=GATEWAYS, engine_replicas=ENGINES) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        requests = encode_turn(server, workload, 1)
        run_on_uvloop(lambda: closed_loop(server.url, requests, workload.streams))
        family = ProcessFamily((server.root_pid,))
        time.sleep(IDLE_SETTLE_S)
        idle = family.read_cpu()
        time.sleep(IDLE_S)
        before, took_s, text = family.read_cpu(), [], ""
        for _ in range(scrapes):
            begun_s = time.perf_counter()
            text = client.get("/metrics").raise_for_status().text
            took_s.append(time.perf_counter() - begun_s)
        after = family.read_cpu()
    resting, scraping = cpu_used(idle, before), cpu_used(before, after)
    share = (after.at_s - before.at_s) / (before.at_s - idle.at_s)
    cpu_ms = {
        role: round(1000 * (seconds - share * resting.get(role, 0.0)) / scrapes, 2)
        for role, seconds in scraping.items()
    }
    return {
        "base": base, "gateways": GATEWAYS, "engines": ENGINES, "adapters": ADAPTERS, "scrapes": scrapes,
        "median_ms": round(1000 * statistics.median(took_s), 1), "worst_ms": round(1000 * max(took_s), 1),
        "kilobytes": round(len(text) / 1000, 1),
        "series": sum(bool(line) and not line.startswith("#") for line in text.splitlines()),
        "cpu_ms": sum(cpu_ms.values()), "cpu_ms_by_role": cpu_ms,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    text = f"{result['gateways']} gateways, {result['engines']} engine, {result['adapters']} adapters: "
    text += f"{result['series']} series, {result['kilobytes']} kB, in {result['median_ms']} ms (at worst "
    text += (
        f"{result['worst_ms']} of {result['scrapes']} scrapes), {result['cpu_ms']:.1f} ms of CPU in all.\n\n"
    )
    costly = sorted(result["cpu_ms_by_role"].items(), key=lambda item: -item[1])
    rows = [[role, f"{ms:.1f}"] for role, ms in costly if ms >= 0.5]
    return text + markdown(["process", "CPU a scrape, ms"], rows)
