"""The steward: one process that looks after what no request waits for.

It closes what dead gateways left, forgets what has expired, tells of budgets, bills what time costs, and
compares the ledger with the engines. Each chore stands alone: one that fails is tried again in its turn and
holds up no other. All of them may be repeated, and run in two stewards at a time.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

from serve.billing.budgets.alerts import BudgetFigures, figures
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.queries import UsageQueries
from serve.billing.metering.reconciliation import EngineCount, Reconciliation, reconcile
from serve.billing.webhooks import outbox
from serve.billing.webhooks.outbox import NoticeFigures
from serve.client_data.idempotency import Idempotency
from serve.client_data.stored_responses import StoredResponses
from serve.engine.protocol import Counters, Engine
from serve.errors import EngineUnavailable, StoreUnavailable
from serve.maintenance.recovery import Recovery, Release
from serve.storage.database import Store

log = logging.getLogger(__name__)

Job = Callable[[], Awaitable[None]]
NO_BUDGETS, NO_NOTICES = BudgetFigures((), 0), NoticeFigures()


@dataclass(frozen=True, slots=True)
class StewardStatus:
    """What the steward sees. `drift` is of `drift_at` (Unix time): when nothing was under way.

    `chores` says for each chore how many seconds ago it was last done.
    """

    open_holds: int = 0
    oldest_hold_s: float = 0.0
    recovered_settled: int = 0
    recovered_voided: int = 0
    drift: tuple[Reconciliation, ...] = ()
    drift_at: float | None = None
    jobs: Mapping[str, float] = field(default_factory=dict)
    budgets: BudgetFigures = NO_BUDGETS
    intervals: Mapping[str, float] = field(default_factory=dict)  # of the chores, in seconds
    failures: Mapping[str, int] = field(default_factory=dict)  # of the chores
    notices: NoticeFigures = NO_NOTICES
    oldest_notice_s: float = 0.0


class StewardClient(Protocol):
    """A steward, as gateways see it."""

    async def status(self) -> StewardStatus:
        """Raises EngineUnavailable if the steward is away."""


class Steward:
    """`run` it. Other modules' chores are given as `chores`: name → (interval in s, what to do)."""

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
        for name, (interval_s, chore) in (jobs or {}).items():
            self._jobs[name] = (interval_s, self._threaded(chore))
        self._failures = dict.fromkeys(self._jobs, 0)

    async def run(self) -> None:
        """Until cancelled."""
        await asyncio.gather(*(self._repeat(name, *chore) for name, chore in self._jobs.items()))

    async def status(self) -> StewardStatus:
        """Raises StoreUnavailable."""
        open_holds, oldest_at = await asyncio.to_thread(self._ledger.count_open)
        budgets = await asyncio.to_thread(figures, self._store, self._now())
        told = await asyncio.to_thread(outbox.figures, self._store)
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
            told,
            self._age_s(told.oldest_pending_at),
        )

    def _age_s(self, since: datetime | None) -> float:
        return 0.0 if since is None else max((self._now() - since).total_seconds(), 0.0)

    async def _repeat(self, name: str, interval_s: float, chore: Job) -> None:
        while True:
            try:
                await chore()
                self._done_s[name] = time.monotonic()
            except StoreUnavailable:
                self._failures[name] += 1
                log.warning("%s waits for the store", name)
            except Exception:
                self._failures[name] += 1
                log.exception("%s failed", name)
            await asyncio.sleep(interval_s)

    def _threaded(self, chore: Callable[[datetime], object]) -> Job:
        async def threaded() -> None:
            await asyncio.to_thread(chore, self._now())

        return threaded

    async def _sweep(self) -> None:
        await asyncio.to_thread(self._idempotency.sweep, at=self._now())
        await asyncio.to_thread(self._responses.sweep, at=self._now())

    async def _reconcile(self) -> None:
        """Compare in a moment in which nothing was under way: the engine counts before anybody can settle."""
        usage = UsageQueries(self._store)
        before = await asyncio.to_thread(usage.by_engine)
        counters: list[Counters] = []
        for engine in self._engines.values():
            try:
                counters += await engine.counters()
            except EngineUnavailable:
                continue  # an engine that is down has no counters
        under_way = await asyncio.to_thread(self._ledger.open_holds, limit=1)
        if under_way or await asyncio.to_thread(usage.by_engine) != before:
            return
        entries = reconcile([engine_count(one) for one in counters], before)
        for entry in entries:
            if not entry.agrees:
                log.error("the ledger and engine %s disagree: %s", entry.engine.boot, entry)
        self._drift, self._drift_at = tuple(entries), time.time()


def engine_count(one: Counters) -> EngineCount:
    return EngineCount(
        one.base,
        one.replica,
        one.boot,
        one.prompt_tokens,
        one.completion_tokens,
        one.probe_prompt_tokens,
        one.probe_completion_tokens,
    )
