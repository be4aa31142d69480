"""Commits the ledger entries of many requests in few transactions (group commit).

One thread writes. All entries that arrive while it commits are applied together in its next transaction.
A request thus pays its share of one fsync, and never more than one thread of a gateway writes to the store.
A single entry is committed at once.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

from serve.billing.ledger.holds import HoldRequest, Outcome, Resolution
from serve.billing.ledger.ledger import Ledger
from serve.errors import StoreUnavailable

log = logging.getLogger(__name__)

BATCH_MAX = 256


@dataclass(frozen=True, slots=True)
class _QueuedEntry:
    entry: HoldRequest | Resolution
    outcome: "Future[Outcome]" = field(default_factory=Future)


class CommitQueue:
    """Queues ledger entries and commits them in batches. After `stop`, entries raise StoreUnavailable."""

    def __init__(self, ledger: Ledger, on_commit: Callable[[int, float], None] | None = None) -> None:
        """`on_commit` is called after each transaction with its number of entries and its seconds."""
        self._ledger = ledger
        self._on_commit = on_commit
        self._queue: queue.SimpleQueue[_QueuedEntry | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopped = False

    async def hold(self, request: HoldRequest) -> None:
        """Take a hold. Raises what refused it (see `Ledger.apply`), or StoreUnavailable."""
        await self._submit_and_wait(request)

    async def resolve(self, resolution: Resolution) -> bool:
        """Settle or void. False if the request was resolved before. Raises StoreUnavailable."""
        return bool(await self._submit_and_wait(resolution))

    def submit(self, entry: HoldRequest | Resolution) -> "Future[Outcome]":
        """Queue an entry. Return the future that `hold` and `resolve` wait for; for use from threads."""
        queued = _QueuedEntry(entry)
        with self._lock:
            if self._stopped:
                raise StoreUnavailable()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
                self._writer.start()
            self._queue.put(queued)
        return queued.outcome

    def stop(self) -> None:
        """Commit what is queued, then stop."""
        with self._lock:
            self._stopped = True
            writer, self._writer = self._writer, None
            if writer is not None:
                self._queue.put(None)
        if writer is not None:
            writer.join()

    async def _submit_and_wait(self, entry: HoldRequest | Resolution) -> Outcome:
        outcome = await asyncio.wrap_future(self.submit(entry))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _write(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < BATCH_MAX and not last:
                try:
                    queued = self._queue.get_nowait()
                except queue.Empty:
                    break
                if queued is None:
                    last = True
                else:
                    batch.append(queued)
            self._commit(batch)
            if last:
                return

    def _commit(self, batch: list[_QueuedEntry]) -> None:
        try:
            began_s = monotonic()
            outcomes = self._ledger.apply([queued.entry for queued in batch])
            if self._on_commit is not None:
                self._on_commit(len(batch), monotonic() - began_s)
        except StoreUnavailable as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            if len(batch) > 1:  # one entry is at fault; the others must not fail with it
                log.exception("a batch of %d is done one by one", len(batch))
                for queued in batch:
                    self._commit([queued])
                return
            outcomes = [error]
        except BaseException as error:  # whatever happens, no caller may wait without end
            for queued in batch:
                if queued.outcome.set_running_or_notify_cancel():
                    queued.outcome.set_exception(error)
            return
        for queued, outcome in zip(batch, outcomes, strict=True):
            # The caller may have been cancelled; the entry is committed anyway.
            if queued.outcome.set_running_or_notify_cancel():
                queued.outcome.set_result(outcome)
