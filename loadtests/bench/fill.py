"""Fills a SQLite store with a year of usage: events, and the hourly sums over them.

The rows are written in bulk and without a transfer for each, because only reading is measured on them. The
same seed makes the same rows.
"""

import random
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from serve.billing.ledger.accounts import accounts_table, transfer
from serve.billing.metering.events import usage_table
from serve.billing.metering.rollups import SUMS, hours_table
from serve.billing.pricing.plans import Prices, PriceVersion, Tokens, read_plan
from serve.billing.pricing.tables import subscriptions_table
from serve.storage.database import Store
from serve.tenants.tables import keys_table, projects_table, tenants_table

PLAN = Path(__file__).parents[2] / "configs" / "prices" / "standard.yaml"
TENANTS = 100
LARGEST_SHARE = 0.2
MONTHS = 13
MODELS = (("base", 0.6), ("support", 0.3), ("search", 0.1))
BATCH_SHARE = 0.1
CACHED_SHARE = 0.3
KEY_SHARES = (0.7, 0.2, 0.1)
COLUMNS = [column.name for column in usage_table.columns if column.name != "id"]

Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Customer:
    """Names a tenant with its price version; `keys` are pairs of id and project."""

    name: str
    price: PriceVersion
    keys: Sequence[tuple[str, str | None]]


def fill(path: Path, events: int, *, end: datetime, seed: int) -> list[Customer]:
    """Makes the store at `path` with `events` events in the MONTHS before `end`, as many in each hour.

    Returns the customers. The first of them is the largest.
    """
    start = end
    for _ in range(MONTHS):
        start = (start - timedelta(days=1)).replace(day=1)
    with closing(Store(f"sqlite:///{path}")) as store:
        store.migrate()
        customers = onboard(store, start)
    hours = int((end - start).total_seconds() // 3600)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # Not durable while it is filled; nobody reads it yet.
        for pragma in ("journal_mode=MEMORY", "synchronous=OFF", "cache_size=-500000"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("BEGIN")
        traffic = _Traffic(random.Random(seed), customers)
        for number in range(hours):
            count = events * (number + 1) // hours - events * number // hours
            rows, sums = traffic.hour(start + timedelta(hours=number), count)
            connection.executemany(_insert(usage_table, COLUMNS), rows)
            connection.executemany(_insert(hours_table, [c.name for c in hours_table.columns]), sums)
        spent = "SELECT coalesce(sum(cost_nanos), 0) FROM usage_hours WHERE tenant_id = accounts.tenant_id"
        connection.execute(f"UPDATE accounts SET spent_nanos = ({spent})")
        connection.execute("COMMIT")
        connection.execute("ANALYZE")
        connection.execute("PRAGMA journal_mode=WAL")
    return customers


def onboard(store: Store, at: datetime, *, tenants: int = TENANTS) -> list[Customer]:
    """Creates customers with credit, three keys each, on the standard plan, in one transaction."""
    price = Prices(store).publish(read_plan(PLAN), at=at)
    customers = []
    with store.write() as connection:
        for number in range(tenants):
            name, web = f"customer-{number:03d}", f"proj_{number:03d}"
            connection.execute(tenants_table.insert().values(id=name, created_at=at))
            project = {"id": web, "tenant_id": name, "name": "web", "created_at": at}
            connection.execute(projects_table.insert().values(project))
            keys = [
                (f"key_{number:03d}{letter}", of) for letter, of in (("a", web), ("b", None), ("c", None))
            ]
            for key_id, of in keys:
                key = {
                    "id": key_id,
                    "tenant_id": name,
                    "digest": key_id,
                    "hint": "none",
                    "scopes": "inference",
                }
                connection.execute(keys_table.insert().values(key | {"project_id": of, "created_at": at}))
            account = {"tenant_id": name, "credit_nanos": 0, "spent_nanos": 0, "held_nanos": 0}
            connection.execute(accounts_table.insert().values(account))
            transfer(connection, name, "grant", 10**17, reference=f"grant-{number}", reason="bench", at=at)
            on = {"tenant_id": name, "plan_id": price.id, "effective_at": at}
            connection.execute(subscriptions_table.insert().values(on))
            customers.append(Customer(name, price, keys))
    return customers


class _Traffic:
    """Generates each hour's events, in the order of their times, and their sums."""

    def __init__(self, seeded: random.Random, customers: Sequence[Customer]) -> None:
        self._seeded = seeded
        self._customers = customers
        others = (1 - LARGEST_SHARE) / (len(customers) - 1)
        self._shares = list(accumulate([LARGEST_SHARE, *[others] * (len(customers) - 1)]))
        plan = customers[0].price.plan
        self._rates = {
            (adapter, tier): plan.rates(adapter=adapter, batch=tier == "batch")
            for adapter in (True, False)
            for tier in ("default", "batch")
        }
        self._number = 0

    def hour(self, hour: datetime, count: int) -> tuple[list[Row], Iterator[Row]]:
        seeded, rows = self._seeded, []
        sums: dict[Row, list[int]] = defaultdict(lambda: [0] * len(SUMS))
        buyers = seeded.choices(self._customers, cum_weights=self._shares, k=count)
        models = seeded.choices([name for name, _ in MODELS], [share for _, share in MODELS], k=count)
        keys = seeded.choices(range(len(KEY_SHARES)), KEY_SHARES, k=count)
        times = sorted(seeded.randrange(3_600_000_000) for _ in range(count))
        hour_text, period = f"{hour:%Y-%m-%d %H:00:00.000000}", f"{hour:%Y-%m}"
        for buyer, model, key, time_us in zip(buyers, models, keys, times, strict=True):
            adapter = model != "base"
            name = f"{buyer.name}/{model}" if adapter else model
            tier = "batch" if seeded.random() < BATCH_SHARE else "default"
            prompt, completion = seeded.randrange(50, 2000), seeded.randrange(1, 500)
            cached = prompt // 2 if seeded.random() < CACHED_SHARE else 0
            tokens = Tokens(prompt, cached, completion)
            cost = self._rates[adapter, tier].cost_nanos(tokens)
            key_id, project = buyer.keys[key]
            seconds, us = divmod(time_us, 1_000_000)
            at = f"{hour_text[:14]}{seconds // 60:02d}:{seconds % 60:02d}.{us:06d}"
            self._number += 1
            rows.append(
                (
                    f"req-{self._number:012d}",
                    buyer.name,
                    key_id,
                    name,
                    "base",
                    f"{name}@1" if adapter else None,
                    buyer.price.id,
                    "replica-1",
                    "boot-1",
                    1,
                    prompt,
                    cached,
                    completion,
                    cost,
                    "complete",
                    "stop",
                    80,
                    900,
                    at,
                    tier,
                    project,
                    1,
                    0,
                    period,
                )
            )
            totals = sums[
                buyer.name, hour_text, period, project or "", key_id, name, adapter, buyer.price.id, tier
            ]
            for position, counted in enumerate((1, prompt, cached, completion, 0, cost)):
                totals[position] += counted
        return rows, ((*group, *counts) for group, counts in sums.items())


def _insert(table: sa.Table, columns: Sequence[str]) -> str:
    return f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"
