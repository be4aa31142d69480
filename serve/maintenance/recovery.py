"""Recovers requests of dead gateways: settles or voids their open holds.

A gateway is dead when the lock on its checkpoint file is free (`billing/ledger/checkpoints.py`), or when a
hold's lease has expired and no checkpoint file on this machine belongs to its owner. The engine then ends the
request and reports its usage. Of the engine's count and the checkpoint, the higher one is billed. Everything
here may run twice, or in two stewards at a time: the ledger resolves each request once.
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

from serve.billing.ledger.checkpoints import (
    Checkpoint,
    RequestEnd,
    checkpoint_files,
    lock_checkpoints,
    merge,
    remove_checkpoints,
)
from serve.billing.ledger.holds import OpenHold, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import FailedAttempt, UsageEvent, UsageStatus
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.engine.protocol import Engine
from serve.errors import EngineUnavailable

log = logging.getLogger(__name__)

PARALLEL_MAX = 32
# An engine that does not answer may be restarting, and would then know nothing, or may be busy for a moment.
ENGINE_PATIENCE = timedelta(seconds=60)
# A live gateway resolves its own holds, even late. After this long beyond the lease it never will.
OWNER_PATIENCE = timedelta(hours=1)

# The store may commit a dead gateway's last hold just after the search for its holds. Its checkpoint file is
# therefore kept, and read again, for longer than any commit takes.
RETENTION_S = 30.0

Release = Callable[[str, sa.Connection], None]


class Recovery:
    """Resolves the open holds of dead gateways.

    `release` frees what is stored for the client of a lost request (`CommitHook.on_void`), by request id.
    """

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
        self._first_asked_at: dict[str, datetime] = {}
        self.settled = 0
        self.voided = 0

    async def run(self) -> None:
        """Resolve the holds that can be resolved now. Raises StoreUnavailable."""
        live_gateways = set()
        for path in await asyncio.to_thread(checkpoint_files, self._checkpoints_dir):
            with lock_checkpoints(path) as records:
                if records is None:
                    live_gateways.add(path.stem)
                    continue
                holds = await asyncio.to_thread(self._ledger.held_by, path.stem)
                if (
                    await self._resolve_all(holds, records)
                    and time.time() - path.stat().st_mtime > RETENTION_S
                ):
                    remove_checkpoints(path)
        at = self._now()
        expired = await asyncio.to_thread(self._ledger.open_holds, expired_at=at, limit=1000)
        abandoned = [
            hold
            for hold in expired
            if hold.hold.owner not in live_gateways or hold.lease_expires_at + OWNER_PATIENCE < at
        ]
        await self._resolve_all(abandoned, {})

    async def _resolve_all(self, holds: list[OpenHold], records: Mapping[str, Checkpoint]) -> bool:
        """Resolve `holds`. Return whether all of them are resolved."""
        all_resolved = True
        for start in range(0, len(holds), PARALLEL_MAX):
            batch = holds[start : start + PARALLEL_MAX]
            outcomes = await asyncio.gather(
                *(self._resolve(open_hold, records.get(open_hold.hold.request_id)) for open_hold in batch)
            )
            all_resolved = all_resolved and all(outcomes)
        return all_resolved

    async def _resolve(self, open_hold: OpenHold, record: Checkpoint | None) -> bool:
        request_id = open_hold.hold.request_id
        terms = BillingTerms.from_json(open_hold.hold.terms) if open_hold.hold.terms else None
        if terms is None:
            return await self._commit(
                Resolution(request_id, open_hold.hold.tenant, self._now(), reason="lease expired")
            )
        try:
            usages = await self._final_usage(terms.base, request_id)
        except EngineUnavailable:
            at = self._now()
            # A clock that steps back restarts the wait; without `min` it would prolong it by the step.
            first_asked_at = self._first_asked_at[request_id] = min(
                self._first_asked_at.get(request_id, at), at
            )
            if at < first_asked_at + ENGINE_PATIENCE:
                return False
            usages = []
        self._first_asked_at.pop(request_id, None)
        for usage in usages:
            record = Checkpoint(usage) if record is None else merge(record, Checkpoint(usage))
        return await self._commit(self._resolution(open_hold, terms, record, usages))

    async def _final_usage(self, base: str, request_id: str) -> list[RequestUsage]:
        engine = self._engines.get(base)
        if engine is None:
            return []
        usages = []
        for attempt, name in ((1, request_id), (2, f"{request_id}-2")):  # as `Generation` names them
            usages += [replace(usage, attempt=attempt) for usage in await engine.final_usage(name)]
        return usages

    def _embeds(self, base: str) -> bool:
        engine = self._engines.get(base)
        return engine is not None and engine.embedding_size is not None

    def _resolution(
        self, open_hold: OpenHold, terms: BillingTerms, record: Checkpoint | None, usages: list[RequestUsage]
    ) -> Resolution:
        request_id, tenant, at = open_hold.hold.request_id, terms.tenant, self._now()
        embeds = self._embeds(terms.base)
        failed = [
            _failed(request_id, terms, usage, at, embeds)
            for usage in usages
            if record is not None and usage.attempt != record.usage.attempt
        ]
        # An answer that was to be empty has an end and no completion.
        if record is None or not (record.usage.tokens.completion or record.end):
            if embeds:  # its client has no vector, and vLLM has counted what it computed
                failed = [_failed(request_id, terms, usage, at, embeds) for usage in usages]
            return Resolution(request_id, tenant, at, reason="gateway died", failed=tuple(failed))
        if terms.rerun_if_lost:
            failed.append(_failed(request_id, terms, record.usage, at, embeds))
            release = partial(self._release, request_id)
            return Resolution(
                request_id, tenant, at, reason="gateway died", failed=tuple(failed), in_transaction=release
            )
        event = _event(open_hold, terms, record, at)
        return Resolution(request_id, tenant, at, event=event, failed=tuple(failed))

    async def _commit(self, resolution: Resolution) -> bool:
        if await self._commit_queue.resolve(resolution):
            if resolution.event is None:
                self.voided += 1
            else:
                self.settled += 1
            log.warning(
                "request %s of a dead gateway is %s",
                resolution.request_id,
                f"settled, {resolution.event.status}" if resolution.event else "voided",
            )
        return True


def _event(open_hold: OpenHold, terms: BillingTerms, record: Checkpoint, at: datetime) -> UsageEvent:
    waited_ms = max(round((at - open_hold.created_at).total_seconds() * 1000), 0)
    # A recorded end is settled as recorded; otherwise the request counts as INCOMPLETE.
    end = record.end or RequestEnd(UsageStatus.INCOMPLETE, None, waited_ms, waited_ms, at)
    return terms.event(
        open_hold.hold.request_id,
        record.usage,
        end.status,
        end.finish_reason,
        ttft_ms=end.ttft_ms,
        latency_ms=end.latency_ms,
        at=end.at,
    )


def _failed(
    request_id: str, terms: BillingTerms, usage: RequestUsage, at: datetime, embeds: bool
) -> FailedAttempt:
    tokens = usage.tokens
    return FailedAttempt(
        request_id,
        usage.attempt,
        terms.tenant,
        terms.model,
        usage.replica,
        usage.boot,
        "GatewayDied",
        at,
        tokens.prompt * terms.samples if tokens.completion or embeds else 0,
        tokens.completion,
    )
