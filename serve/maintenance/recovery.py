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
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

import sqlalchemy as sa

from serve.billing.ledger.checkpoints import End, Record, journals, later, remove, taken
from serve.billing.ledger.ledger import Closing, Ledger, OpenHold
from serve.billing.ledger.writer import Books
from serve.billing.metering.events import FailedAttempt, Status, UsageEvent
from serve.billing.metering.terms import Sale, Served
from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Engine, Final
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
        books: Books,
        engines: Mapping[str, Engine],
        journals_dir: Path,
        release: Release,
        *,
        now: Callable[[], datetime],
    ) -> None:
        self._ledger = ledger
        self._books = books
        self._engines = engines
        self._journals_dir = journals_dir
        self._release = release
        self._now = now
        self._asked: dict[str, datetime] = {}
        self.settled = 0
        self.voided = 0

    async def run(self) -> None:
        """Close what can be closed now. Raises StoreUnavailable."""
        alive = set()
        for path in await asyncio.to_thread(journals, self._journals_dir):
            with taken(path) as records:
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

    async def _close_all(self, holds: list[OpenHold], records: Mapping[str, Record]) -> bool:
        """Whether all of `holds` are closed."""
        done = True
        for start in range(0, len(holds), AT_ONCE):
            some = holds[start : start + AT_ONCE]
            closed = await asyncio.gather(
                *(self._close(one, records.get(one.hold.request_id)) for one in some)
            )
            done = done and all(closed)
        return done

    async def _close(self, held: OpenHold, record: Record | None) -> bool:
        request_id = held.hold.request_id
        sale = Sale.from_json(held.hold.sale) if held.hold.sale else None
        if sale is None:
            return await self._finish(
                Closing(request_id, held.hold.tenant, self._now(), reason="lease expired")
            )
        try:
            found = await self._finals(sale.base, request_id)
        except EngineUnavailable:
            at = self._now()
            # A clock that has stepped back begins the wait anew, and does not prolong it by the step.
            asked = self._asked[request_id] = min(self._asked.get(request_id, at), at)
            if at < asked + ENGINE_PATIENCE:
                return False
            found = []
        self._asked.pop(request_id, None)
        for served in found:
            record = Record(served) if record is None else later(record, Record(served))
        return await self._finish(self._closing(held, sale, record, found))

    async def _finals(self, base: str, request_id: str) -> list[Served]:
        engine = self._engines.get(base)
        if engine is None:
            return []
        found = []
        for attempt, name in ((1, request_id), (2, f"{request_id}-2")):  # as `Generation` names them
            found += [_served(final, attempt) for final in await engine.finals(name)]
        return found

    def _closing(self, held: OpenHold, sale: Sale, record: Record | None, found: list[Served]) -> Closing:
        request_id, tenant, at = held.hold.request_id, sale.tenant, self._now()
        failed = [
            _failed(request_id, sale, other, at)
            for other in found
            if record is not None and other.attempt != record.served.attempt
        ]
        if record is None or not record.served.tokens.completion:
            return Closing(request_id, tenant, at, reason="gateway died", failed=tuple(failed))
        if sale.again:
            failed.append(_failed(request_id, sale, record.served, at))
            also = partial(self._release, request_id)
            return Closing(request_id, tenant, at, reason="gateway died", failed=tuple(failed), also=also)
        event = _event(held, sale, record, at)
        return Closing(request_id, tenant, at, event=event, failed=tuple(failed))

    async def _finish(self, closing: Closing) -> bool:
        if await self._books.close(closing):
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


def _event(held: OpenHold, sale: Sale, record: Record, at: datetime) -> UsageEvent:
    waited_ms = max(round((at - held.created_at).total_seconds() * 1000), 0)
    # What its gateway was about to settle is settled so; else nobody knows how it would have ended.
    end = record.end or End(Status.INCOMPLETE, None, waited_ms, waited_ms, at)
    return sale.event(
        held.hold.request_id,
        record.served,
        end.status,
        end.finish_reason,
        ttft_ms=end.ttft_ms,
        latency_ms=end.latency_ms,
        at=end.at,
    )


def _served(final: Final, attempt: int) -> Served:
    tokens = Tokens(final.prompt_tokens, final.cached_tokens, final.completion_tokens)
    return Served(final.replica, final.boot, tokens, attempt, final.cold_loads)


def _failed(request_id: str, sale: Sale, served: Served, at: datetime) -> FailedAttempt:
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
