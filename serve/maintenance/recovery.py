"""What dead gateways left open is closed: by the engine's own count, or by the last checkpoint.

A gateway is dead when the lock on its journal is free (`billing/journal.py`), or when a hold's lease has run
out and no journal here is its. Then the engines are told to end the request and asked what they did for it;
with what the journal says, the highest count holds. Everything here may run twice, or in two stewards at a
time: a request is closed once, whoever comes first.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from serve.billing.ledger.checkpoints import Checkpoint, RequestEnd, checkpoint_files, later, locked, remove
from serve.billing.ledger.ledger import Ledger, OpenHold, Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import FailedAttempt, UsageEvent, UsageStatus
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.engine.protocol import Engine
from serve.errors import EngineUnavailable

log = logging.getLogger(__name__)

AT_ONCE = 32
# An engine that does not answer may be starting anew, and would then know nothing; or be busy for a moment.
ENGINE_PATIENCE = timedelta(seconds=60)
# A live gateway closes what it opened, however late. This long after the lease it has forgotten to.
OWNER_PATIENCE = timedelta(hours=1)

# The store may commit a dead gateway's last hold a moment after that was looked for: its journal is kept, and
# looked at, a little longer than anything takes to commit.
KEPT_S = 30.0

Release = Callable[[str, sa.Connection], None]


class Recovery:
    """`release` frees what is kept for the client of a lost request (`Keeper.release`), by its id."""

    def __init__(
        self,
        ledger: Ledger,
        commit_queue: CommitQueue,
        engines: Mapping[str, Engine],
        checkpoints_dir: Path,
        release: Release,
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._ledger = ledger
        self._commit_queue = commit_queue
        self._engines = engines
        self._checkpoints_dir = checkpoints_dir
        self._release = release
        self._now = now
        self._asked: dict[str, datetime] = {}
        self.settled = 0
        self.voided = 0

    async def run(self) -> None:
        """Close what can be closed now. Raises StoreUnavailable."""
        alive = set()
        for path in await asyncio.to_thread(checkpoint_files, self._checkpoints_dir):
            with locked(path) as records:
                if records is None:
                    alive.add(path.stem)
                    continue
                holds = await asyncio.to_thread(self._ledger.held_by, path.stem)
                if await self._close_all(holds, records) and time.time() - path.stat().st_mtime > KEPT_S:
                    remove(path)
        at = self._now()
        expired = await asyncio.to_thread(self._ledger.open_holds, expired_at=at, limit=1000)
        lost = [
            hold
            for hold in expired
            if hold.hold.owner not in alive or hold.lease_expires_at + OWNER_PATIENCE < at
        ]
        await self._close_all(lost, {})

    async def _close_all(self, holds: list[OpenHold], records: Mapping[str, Checkpoint]) -> bool:
        """Whether all of `holds` are closed."""
        done = True
        for start in range(0, len(holds), AT_ONCE):
            some = holds[start : start + AT_ONCE]
            closed = await asyncio.gather(
                *(self._close(one, records.get(one.hold.request_id)) for one in some)
            )
            done = done and all(closed)
        return done

    async def _close(self, held: OpenHold, record: Checkpoint | None) -> bool:
        request_id = held.hold.request_id
        sale = BillingTerms.from_json(held.hold.terms) if held.hold.terms else None
        if sale is None:
            return await self._finish(
                Resolution(request_id, held.hold.tenant, self._now(), reason="lease expired")
            )
        try:
            found = await self._final_usage(sale.base, request_id)
        except EngineUnavailable:
            at = self._now()
            # A clock that has stepped back begins the wait anew, and does not prolong it by the step.
            asked = self._asked[request_id] = min(self._asked.get(request_id, at), at)
            if at < asked + ENGINE_PATIENCE:
                return False
            found = []
        self._asked.pop(request_id, None)
        for served in found:
            record = Checkpoint(served) if record is None else later(record, Checkpoint(served))
        return await self._finish(self._resolution(held, sale, record, found))

    async def _final_usage(self, base: str, request_id: str) -> list[RequestUsage]:
        engine = self._engines.get(base)
        if engine is None:
            return []
        found = []
        for attempt, name in ((1, request_id), (2, f"{request_id}-2")):  # as `Generation` names them
            found += [replace(usage, attempt=attempt) for usage in await engine.final_usage(name)]
        return found

    def _resolution(
        self, held: OpenHold, sale: BillingTerms, record: Checkpoint | None, found: list[RequestUsage]
    ) -> Resolution:
        request_id, tenant, at = held.hold.request_id, sale.tenant, self._now()
        failed = [
            _failed(request_id, sale, other, at)
            for other in found
            if record is not None and other.attempt != record.served.attempt
        ]
        if record is None or not record.served.tokens.completion:
            return Resolution(request_id, tenant, at, reason="gateway died", failed=tuple(failed))
        if sale.rerun_if_lost:
            failed.append(_failed(request_id, sale, record.served, at))
            also = partial(self._release, request_id)
            return Resolution(
                request_id, tenant, at, reason="gateway died", failed=tuple(failed), in_transaction=also
            )
        event = _event(held, sale, record, at)
        return Resolution(request_id, tenant, at, event=event, failed=tuple(failed))

    async def _finish(self, closing: Resolution) -> bool:
        if await self._commit_queue.close(closing):
            if closing.event is None:
                self.voided += 1
            else:
                self.settled += 1
            log.warning(
                "request %s of a dead gateway is %s",
                closing.request_id,
                f"settled, {closing.event.status}" if closing.event else "voided",
            )
        return True


def _event(held: OpenHold, sale: BillingTerms, record: Checkpoint, at: datetime) -> UsageEvent:
    waited_ms = max(round((at - held.created_at).total_seconds() * 1000), 0)
    # What its gateway was about to settle is settled so; else nobody knows how it would have ended.
    end = record.end or RequestEnd(UsageStatus.INCOMPLETE, None, waited_ms, waited_ms, at)
    return sale.event(
        held.hold.request_id,
        record.served,
        end.status,
        end.finish_reason,
        ttft_ms=end.ttft_ms,
        latency_ms=end.latency_ms,
        at=end.at,
    )


def _failed(request_id: str, sale: BillingTerms, served: RequestUsage, at: datetime) -> FailedAttempt:
    return FailedAttempt(
        request_id,
        served.attempt,
        sale.tenant,
        sale.model,
        served.replica,
        served.boot,
        "GatewayDied",
        at,
        served.tokens.prompt * sale.samples,
        served.tokens.completion,
    )
