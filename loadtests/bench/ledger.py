"""Measures the ledger: settlements a second, what a request waits for, and reading ten million events.

    .venv/bin/python -m loadtests.bench.ledger

Settlements go through the gateway's own group commit with every fsync on. Usage and invoices are read,
through the real app, from a store that is filled for it (`fill.py`) and deleted afterwards. The report is
printed as a table and as one JSON object, and written to loadtests/results/.
"""

import argparse
import asyncio
import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from loadtests.bench.fill import MONTHS, TENANTS, Customer, fill, onboard
from loadtests.bench.machine import machine
from serve.billing.invoicing.invoices import Invoices
from serve.billing.ledger.holds import Hold, HoldRequest, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import UsageEvent, UsageStatus
from serve.billing.pricing.plans import Tokens
from serve.deployment.app import build_app
from serve.settings import Settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret
from tests.support.postgres import Postgres

RESULTS = Path(__file__).parents[1] / "results" / "ledger.json"
END = datetime(2026, 11, 1, tzinfo=UTC)  # of the filled store's last month
MONTH_START = datetime(2026, 10, 1, tzinfo=UTC)
LEASE = timedelta(minutes=5)
WARM_UP = 512  # requests before a clock starts
IN_FLIGHT = 512
RATE_PER_S = 50
REQUEST_S = 0.2  # between hold and settlement, at RATE_PER_S
REPEATS = 5  # of each query; the slowest counts


@dataclass(frozen=True, slots=True)
class LedgerTraffic:
    """Makes holds and settlements for one store's customers, in turn."""

    customers: list[Customer]

    def opening(self, number: int) -> HoldRequest:
        customer = self.customers[number % len(self.customers)]
        hold = Hold(f"bench-{number}", customer.name, 1_000_000, key_id=customer.keys[0][0])
        return HoldRequest(hold, datetime.now(UTC), LEASE)

    def closing(self, number: int) -> Resolution:
        customer, at = self.customers[number % len(self.customers)], datetime.now(UTC)
        key_id, project = customer.keys[0]
        tokens = Tokens(500, 100, 120)
        event = UsageEvent(
            request_id=f"bench-{number}",
            tenant=customer.name,
            key_id=key_id,
            project=project,
            model=f"{customer.name}/support",
            base="base",
            adapter_version=f"{customer.name}/support@1",
            plan_id=customer.price.id,
            replica="replica-1",
            boot="boot-1",
            samples=1,
            tokens=tokens,
            cost_nanos=customer.price.rates(adapter=True).cost_nanos(tokens),
            status=UsageStatus.COMPLETE,
            finish_reason="stop",
            ttft_ms=80,
            latency_ms=900,
            created_at=at,
        )
        return Resolution(event.request_id, customer.name, at, event=event)


async def time_all(numbers: range, step: Callable[[int], Awaitable[object]]) -> float:
    """Returns the seconds that `step` takes for all of `numbers`, IN_FLIGHT of them at a time."""
    waiting = iter(numbers)

    async def work() -> None:
        for number in waiting:
            await step(number)

    started_s = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - started_s


async def throughput(commit_queue: CommitQueue, traffic: LedgerTraffic, requests: int) -> dict[str, float]:
    """Returns holds a second, settlements a second, and whole requests (both) a second."""

    async def open_one(number: int) -> None:
        await commit_queue.hold(traffic.opening(number))

    async def close_one(number: int) -> None:
        assert await commit_queue.resolve(traffic.closing(number))

    async def both(number: int) -> None:
        await open_one(number)
        await close_one(number)

    await time_all(range(WARM_UP), both)
    first = range(WARM_UP, WARM_UP + requests)
    second = range(first.stop, first.stop + requests)
    return {
        "holds_per_s": round(requests / await time_all(first, open_one)),
        "settles_per_s": round(requests / await time_all(first, close_one)),
        "requests_per_s": round(requests / await time_all(second, both)),
    }


async def request_waits(commit_queue: CommitQueue, traffic: LedgerTraffic, requests: int) -> list[float]:
    """Returns each request's wait for hold and settlement, in ms, at RATE_PER_S new requests a second."""
    waits_ms: list[float] = []

    async def request(number: int) -> None:
        started_s = time.perf_counter()
        await commit_queue.hold(traffic.opening(number))
        opened_s = time.perf_counter()
        await asyncio.sleep(REQUEST_S)
        ended_s = time.perf_counter()
        assert await commit_queue.resolve(traffic.closing(number))
        waits_ms.append((opened_s - started_s + time.perf_counter() - ended_s) * 1000)

    begun_s, tasks = time.perf_counter(), []
    for number in range(requests):
        await asyncio.sleep(begun_s + number / RATE_PER_S - time.perf_counter())
        tasks.append(asyncio.create_task(request(10**9 + number)))
    await asyncio.gather(*tasks)
    return waits_ms


def settlements(url: str, requests: int, timed: int) -> dict[str, float]:
    """Measures throughput in the store at `url`, and the wait of `timed` requests."""
    with closing(Store(url)) as store:
        store.migrate()
        traffic = LedgerTraffic(onboard(store, datetime.now(UTC), tenants=50))
        commit_queue = CommitQueue(Ledger(store))
        try:
            figures = asyncio.run(throughput(commit_queue, traffic, requests))
            waits_ms = asyncio.run(request_waits(commit_queue, traffic, timed))
        finally:
            commit_queue.stop()
    p99_ms = statistics.quantiles(waits_ms, n=100)[98]
    return figures | {"p50_ms": round(statistics.median(waits_ms), 2), "p99_ms": round(p99_ms, 2)}


def queries(largest: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns usage and cost queries by name: of a month by day, of a day by minute."""
    window: dict[str, Any] = {"start_time": int(MONTH_START.timestamp()), "end_time": int(END.timestamp())}
    month = window | {"limit": 31}
    day = {"start_time": month["end_time"] - 86_400, "end_time": month["end_time"]}
    minutes = day | {"bucket_width": "1m", "limit": 1440}
    of_largest, by_model = {"tenant_ids": largest}, {"group_by": "model"}
    return {
        "usage_month_largest_by_model": ("usage/completions", month | of_largest | by_model),
        "usage_month_everybody_by_tenant": ("usage/completions", month | {"group_by": "tenant"}),
        "usage_month_everybody_by_tenant_model": (
            "usage/completions",
            month | {"group_by": ["tenant", "model"]},
        ),
        "usage_week_everybody_by_hour": ("usage/completions", month | {"bucket_width": "1h", "limit": 168}),
        "usage_day_largest_by_minute": ("usage/completions", minutes | of_largest | by_model),
        "usage_day_everybody_by_minute": ("usage/completions", minutes),
        "costs_month_largest_by_item": ("costs", month | of_largest | {"group_by": "line_item"}),
        "costs_month_everybody_by_tenant": ("costs", month | {"group_by": "tenant"}),
        "forecast_largest": ("forecast", {"tenant": largest}),
        "balance_largest": ("balance", {"tenant": largest}),
    }


async def answer_times(home: Path, largest: str) -> dict[str, float]:
    """Returns the seconds of the slowest of REPEATS answers to each query."""
    settings = Settings(home=home)
    app = build_app(settings, {})
    with closing(Store(settings.store_url)) as store:
        tenants = Tenants(store, server_secret(home))
        _, key = tenants.platform_keys.create("bench", at=datetime.now(UTC))
    headers = {"Authorization": f"Bearer {key}"}
    slowest: dict[str, float] = {}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://bench/v1/organization") as client:
        for name, (path, params) in queries(largest).items():
            seconds = []
            for _ in range(REPEATS):
                started_s = time.perf_counter()
                response = await client.get(f"/{path}", params=params, headers=headers, timeout=600)
                seconds.append(time.perf_counter() - started_s)
                assert response.status_code == 200, response.text
            slowest[name] = round(max(seconds), 3)
    return slowest


def reading(home: Path, events: int, seed: int) -> dict[str, Any]:
    """Fills a store in `home`, runs the queries on it, and makes the largest customer's invoice."""
    path = Path(Settings(home=home).store_url.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    started_s = time.perf_counter()
    largest = fill(path, events, end=END, seed=seed)[0].name
    filled_s = time.perf_counter() - started_s
    answers = asyncio.run(answer_times(home, largest))
    with closing(Store(f"sqlite:///{path}")) as store:
        started_s = time.perf_counter()
        Invoices(store).create(largest, f"{MONTH_START:%Y-%m}", at=END)
        invoice_s = time.perf_counter() - started_s
    return {
        "fill_s": round(filled_s, 1),
        "store_gb": round(path.stat().st_size / 1e9, 2),
        "answers_s": answers,
        "invoice_s": round(invoice_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--requests", type=int, default=20_000, help="in each part of the throughput")
    parser.add_argument("--timed", type=int, default=1500, help=f"requests at {RATE_PER_S}/s")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bespoke-bench-") as folder:
        sqlite = settlements(f"sqlite:///{folder}/ledger.db", options.requests, options.timed)
        with Postgres() as server:
            postgres = settlements(server.create_database(), options.requests, options.timed)
        read = reading(Path(folder, "home"), options.events, options.seed)
    report = {
        **machine(),
        "libraries": {name: version(name) for name in ("sqlalchemy", "psycopg", "fastapi")},
        "sqlite": sqlite3.sqlite_version,
        "seed": options.seed,
        "tenants": TENANTS,
        "months": MONTHS,
        "events": options.events,
        "requests": options.requests,
        "ledger": {"sqlite": sqlite, "postgresql": postgres},
        "reading": read,
        "sqlite_settles_per_s": sqlite["settles_per_s"],
        "postgres_settles_per_s": postgres["settles_per_s"],
        "added_p99_ms": sqlite["p99_ms"],
        "usage_api_10m_s": max(read["answers_s"].values()),
        "invoice_10m_s": read["invoice_s"],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    console = Console()
    console.print(_table(sqlite, postgres, read))
    console.print_json(json.dumps(report))


def _table(sqlite: dict[str, float], postgres: dict[str, float], read: dict[str, Any]) -> Table:
    table = Table("what", "SQLite", "PostgreSQL")
    for name, figure in sqlite.items():
        table.add_row(name, f"{figure:,}", f"{postgres[name]:,}")
    for name, seconds in read["answers_s"].items():
        table.add_row(name, f"{seconds} s", "")
    table.add_row("invoice_month_largest", f"{read['invoice_s']} s", "")
    return table


if __name__ == "__main__":
    main()
