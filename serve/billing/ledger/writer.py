"""Group commit: the ledger as a gateway uses it.

One thread writes. Whatever steps wait while it commits are done together in its next transaction, so a
request pays for its share of one fsync and the store is never asked by many threads at once. Alone, a step
waits for nothing.
"""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic

from serve.billing.ledger.ledger import HoldRequest, Ledger, Outcome, Resolution
from serve.errors import StoreUnavailable

log = logging.getLogger(__name__)

BATCH_MAX = 256


@dataclass(frozen=True, slots=True)
class _Waiting:
    entry: HoldRequest | Resolution
    outcome: "Future[Outcome]" = field(default_factory=Future)


class CommitQueue:
    """Steps of many requests, in the fewest transactions. `stop` it; then steps raise StoreUnavailable."""

    def __init__(self, ledger: Ledger, committed: Callable[[int, float], None] | None = None) -> None:
        """`committed` hears of each transaction: its steps, and the seconds that it took."""
        self._ledger = ledger
        self._committed = committed
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._lock = threading.Lock()
        self._stopped = False

    async def open(self, opening: HoldRequest) -> None:
        """Take a hold. Raises InsufficientCredit, StoreUnavailable, or what `opening.also` raises."""
        await self._do(opening)

    async def close(self, closing: Resolution) -> bool:
        """Settle or void. False if the request was closed before. Raises StoreUnavailable."""
        return bool(await self._do(closing))

    def submit(self, entry: HoldRequest | Resolution) -> "Future[Outcome]":
        """What `open` and `close` wait for, for threads."""
        waiting = _Waiting(entry)
        with self._lock:
            if self._stopped:
                raise StoreUnavailable()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="books", daemon=True)
                self._writer.start()
            self._waiting.put(waiting)
        return waiting.outcome

    def stop(self) -> None:
        """Do what waits, and no more."""
        with self._lock:
            self._stopped = True
            writer, self._writer = self._writer, None
            if writer is not None:
                self._waiting.put(None)
        if writer is not None:
            writer.join()

    async def _do(self, entry: HoldRequest | Resolution) -> Outcome:
        outcome = await asyncio.wrap_future(self.submit(entry))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def _write(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < BATCH_MAX and not last:
                try:
                    following = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if following is None:
                    last = True
                else:
                    batch.append(following)
            self._commit(batch)
            if last:
                return

    def _commit(self, batch: list[_Waiting]) -> None:
        try:
            began_s = monotonic()
            outcomes = self._ledger.apply([waiting.entry for waiting in batch])
            if self._committed is not None:
                self._committed(len(batch), monotonic() - began_s)
        except StoreUnavailable as error:
            outcomes = [error] * len(batch)
        except Exception as error:
            if len(batch) > 1:  # one of them is to blame; the others must not suffer
                log.exception("a batch of %d is done one by one", len(batch))
                for waiting in batch:
                    self._commit([waiting])
                return
            outcomes = [error]
        except BaseException as error:  # whatever it is, nobody waits for ever
            for waiting in batch:
                if waiting.outcome.set_running_or_notify_cancel():
                    waiting.outcome.set_exception(error)
            return
        for waiting, outcome in zip(batch, outcomes, strict=True):
            # Whoever waited may be gone; what was done is done.
            if waiting.outcome.set_running_or_notify_cancel():
                waiting.outcome.set_result(outcome)
