"""Steward: runs the periodic jobs of a deployment in one process.

The jobs recover requests of dead gateways, delete expired data, send budget alerts and webhooks, bill adapter
hours, and compare the ledger with the engines. Jobs are independent: a job that fails is tried again at its
next turn and delays no other. Every job may be repeated, and may run in two stewards at a time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from serve.billing.budgets.alerts import BudgetMetrics, read_budget_metrics
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import EngineCount, Reconciliation, reconcile
from serve.billing.webhooks import outbox
from serve.billing.webhooks.outbox import OutboxMetrics
from serve.client_data.idempotency import Idempotency
from serve.client_data.stored_responses import StoredResponses
from serve.engine.protocol import Counters, Engine
from serve.errors import EngineUnavailable, StoreUnavailable
from serve.maintenance.recovery import Recovery, Release
from serve.storage.database import Store

log = logging.getLogger(__name__)

Job = Callable[[], Awaitable[None]]
NO_BUDGETS, NO_EVENTS = BudgetMetrics((), 0), OutboxMetrics()


@dataclass(frozen=True, slots=True)
class StewardStatus:
    """Reports the steward's view of the deployment.

    `drift` was computed at `drift_at` (Unix time), when no request was running. `jobs` maps each job to the
    seconds since it last succeeded.
    """

    open_holds: int = 0
    oldest_hold_s: float = 0.0
    recovered_settled: int = 0
    recovered_voided: int = 0
    drift: tuple[Reconciliation, ...] = ()
    drift_at: float | None = None
    jobs: Mapping[str, float] = field(default_factory=dict)
    budgets: BudgetMetrics = NO_BUDGETS
    intervals: Mapping[str, float] = field(default_factory=dict)  # of the jobs, in seconds
    failures: Mapping[str, int] = field(default_factory=dict)  # of the jobs
    outbox: OutboxMetrics = NO_EVENTS
    oldest_event_s: float = 0.0


class StewardClient(Protocol):
    """Lets gateways read the steward's status."""

    async def status(self) -> StewardStatus:
        """Return the status. Raises EngineUnavailable if the steward is unreachable."""


class Steward:
    """Runs the periodic jobs. `jobs` adds jobs of other modules: name → (interval in s, function)."""

    def __init__(
        self,
        store: Store,
        engines: Mapping[str, Engine],
        checkpoints_dir: Path,
        release: Release,
        *,
        lease: timedelta,
        jobs: Mapping[str, tuple[float, Callable[[datetime], object]]] | None = None,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._engines = engines
        self._now = now
        self._ledger = Ledger(store)
        self._commit_queue = CommitQueue(self._ledger)
        self._recovery = Recovery(
            self._ledger, self._commit_queue, engines, checkpoints_dir, release, now=now
        )
        self._idempotency = Idempotency(store, lease=lease)
        self._responses = StoredResponses(store)
        self._drift: tuple[Reconciliation, ...] = ()
        self._drift_at: float | None = None
        self._done_s: dict[str, float] = {}
        self._jobs: dict[str, tuple[float, Job]] = {
            "recover": (1.0, self._recovery.run),
            "reconcile": (5.0, self._reconcile),
            "sweep": (30.0, self._sweep),
        }
        for name, (interval_s, job) in (jobs or {}).items():
            self._jobs[name] = (interval_s, self._threaded(job))
        self._failures = dict.fromkeys(self._jobs, 0)

    async def run(self) -> None:
        """Run all jobs until cancelled."""
        await asyncio.gather(
            *(self._repeat(name, *interval_and_job) for name, interval_and_job in self._jobs.items())
        )

    async def status(self) -> StewardStatus:
        """Return the current status. Raises StoreUnavailable."""
        open_holds, oldest_at = await asyncio.to_thread(self._ledger.count_open)
        budgets = await asyncio.to_thread(read_budget_metrics, self._store, self._now())
        outbox_metrics = await asyncio.to_thread(outbox.read_outbox_metrics, self._store)
        return StewardStatus(
            open_holds,
            self._age_s(oldest_at),
            self._recovery.settled,
            self._recovery.voided,
            self._drift,
            self._drift_at,
            {name: time.monotonic() - done_s for name, done_s in self._done_s.items()},
            budgets,
            {name: interval_s for name, (interval_s, _) in self._jobs.items()},
            dict(self._failures),
            outbox_metrics,
            self._age_s(outbox_metrics.oldest_pending_at),
        )

    def _age_s(self, since: datetime | None) -> float:
        return 0.0 if since is None else max((self._now() - since).total_seconds(), 0.0)

    async def _repeat(self, name: str, interval_s: float, job: Job) -> None:
        while True:
            try:
                await job()
                self._done_s[name] = time.monotonic()
            except StoreUnavailable:
                self._failures[name] += 1
                log.warning("%s waits for the store", name)
            except Exception:
                self._failures[name] += 1
                log.exception("%s failed", name)
            await asyncio.sleep(interval_s)

    def _threaded(self, job: Callable[[datetime], object]) -> Job:
        async def run_in_thread() -> None:
            await asyncio.to_thread(job, self._now())

        return run_in_thread

    async def _sweep(self) -> None:
        await asyncio.to_thread(self._idempotency.sweep, at=self._now())
        await asyncio.to_thread(self._responses.sweep, at=self._now())

    async def _reconcile(self) -> None:
        """Compare the ledger with the engines, if no request is running.

        An engine counts a request before it is settled, so counts agree only when nothing is open.
        """
        usage = UsageQueries(self._store)
        billed = await asyncio.to_thread(usage.by_engine)
        counters: list[Counters] = []
        for engine in self._engines.values():
            try:
                counters += await engine.counters()
            except EngineUnavailable:
                continue  # an engine that is down has no counters
        open_holds = await asyncio.to_thread(self._ledger.open_holds, limit=1)
        if open_holds or await asyncio.to_thread(usage.by_engine) != billed:
            return
        entries = reconcile([engine_count(one) for one in counters], billed)
        for entry in entries:
            if not entry.agrees:
                log.error("the ledger and engine %s disagree: %s", entry.engine.boot, entry)
        self._drift, self._drift_at = tuple(entries), time.time()


def engine_count(counters: Counters) -> EngineCount:
    return EngineCount(
        counters.base,
        counters.replica,
        counters.boot,
        counters.prompt_tokens,
        counters.completion_tokens,
        counters.probe_prompt_tokens,
        counters.probe_completion_tokens,
    )
