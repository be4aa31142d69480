"""What a scrape of /metrics costs the service: its time, its size, and the CPU of all processes for it."""

import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from loadtests.bench.connection import requests_of
from loadtests.bench.front import ADAPTERS, IDLE_SETTLE_S, TINY_SLO
from loadtests.bench.group import published
from loadtests.bench.load import closed, run
from loadtests.bench.ours import ours
from loadtests.bench.processes import Family, used
from loadtests.bench.tables import markdown
from loadtests.bench.work import Work

GATEWAYS, ENGINES = 2, 1
IDLE_S = 20.0


def measure(home: Path, base: str, *, scrapes: int) -> dict[str, Any]:
    """One scrape after the other, of an idle service that has served every adapter; less its idleness."""
    work = Work("scrape", 16, 64, 16, mixed=True, slo=TINY_SLO)
    with (
        published(home, base, ADAPTERS) as adapters,
        ours(home, base, adapters, gateway_replicas=GATEWAYS, engine_replicas=ENGINES) as server,
        httpx.Client(base_url=server.url, timeout=30) as client,
    ):
        requests = requests_of(server, work, 1)
        run(lambda: closed(server.url, requests, work.streams))
        family = Family((server.root_pid,))
        time.sleep(IDLE_SETTLE_S)
        idle = family.moment()
        time.sleep(IDLE_S)
        before, took_s, text = family.moment(), [], ""
        for _ in range(scrapes):
            begun_s = time.perf_counter()
            text = client.get("/metrics").raise_for_status().text
            took_s.append(time.perf_counter() - begun_s)
        after = family.moment()
    resting, scraping = used(idle, before), used(before, after)
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


def table(told: dict[str, Any]) -> str:
    said = f"{told['gateways']} gateways, {told['engines']} engine, {told['adapters']} adapters: "
    said += f"{told['series']} series, {told['kilobytes']} kB, in {told['median_ms']} ms (at worst "
    said += f"{told['worst_ms']} of {told['scrapes']} scrapes), {told['cpu_ms']:.1f} ms of CPU in all.\n\n"
    costly = sorted(told["cpu_ms_by_role"].items(), key=lambda item: -item[1])
    rows = [[role, f"{ms:.1f}"] for role, ms in costly if ms >= 0.5]
    return said + markdown(["process", "CPU a scrape, ms"], rows)
