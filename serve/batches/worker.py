"""Runs batches in one gateway: takes them, renews their leases, releases them when it stops."""

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.batches.input import InputBounds
from serve.batches.lines import Lines
from serve.batches.queue import BatchQueue
from serve.batches.runner import Backoff, BatchRun, RunnerContext
from serve.client_data.files import Files
from serve.client_data.uploads import Uploads
from serve.errors import StoreUnavailable, Unauthenticated
from serve.inference.gateway import Gateway
from serve.storage.database import Store
from serve.tenants import Principal, Tenants, keys_table

log = logging.getLogger(__name__)

LEASE = timedelta(seconds=60)
BATCHES_AT_ONCE = 4  # they share the line slots, so that a short batch need not wait for a long one
SWEEP_INTERVAL_S = 600.0


class BatchWorker:
    """Runs batches in the background from `start` to `stop`.

    requests_in_flight: most lines that run at once. lease: how long a batch of a dead worker waits.
    idle_s: how often it looks for work.
    """

    def __init__(
        self,
        *,
        store: Store,
        gateway: Gateway,
        tenants: Tenants,
        files: Files,
        bounds: InputBounds,
        requests_in_flight: int,
        lease: timedelta = LEASE,
        idle_s: float = 2.0,
        now: Callable[[], datetime],
    ) -> None:
        self._idle_s = idle_s
        self._lease_s = lease.total_seconds()
        self._files = files
        self._uploads = Uploads(store, files)
        self._now = now
        self._stopping = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        owner = f"{socket.gethostname()[:30]}-{os.getpid()}-{secrets.token_hex(8)}"
        self._queue = BatchQueue(store, files, owner, lease)
        self._context = RunnerContext(
            gateway=gateway,
            queue=self._queue,
            lines=Lines(store),
            files=files,
            bounds=bounds,
            principal_of=lambda key_id, at: principal_of(store, tenants, key_id, at),
            line_slots=asyncio.Semaphore(requests_in_flight),
            backoff=Backoff(),
            stopping=self._stopping,
            now=now,
        )

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Start no more lines, wait for those in flight, release the leases."""
        self._stopping.set()
        if self._loop is not None:
            await self._loop

    async def run_one(self) -> bool:
        """Take one batch and run it as far as it goes now. False if there is none."""
        batch = await asyncio.to_thread(self._queue.take, at=self._now())
        if batch is None:
            return False
        run = BatchRun(self._context, batch)
        renewing = asyncio.create_task(self._renew_lease(run))
        try:
            await run.run()
        finally:
            renewing.cancel()
        await asyncio.to_thread(self._queue.release, batch.id)
        return True

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(BATCHES_AT_ONCE):
                group.create_task(self._run_batches())
            group.create_task(self._sweep())

    async def _run_batches(self) -> None:
        while not self._stopping.is_set():
            try:
                if await self.run_one():
                    continue
            except StoreUnavailable:
                pass
            except Exception:  # the batch is not tried again until its lease ends
                log.exception("a batch could not go on")
            await self._sleep(self._idle_s)

    async def _renew_lease(self, run: BatchRun) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with contextlib.suppress(StoreUnavailable):  # a hold without the lease is refused anyway
                await run.renew()

    async def _sweep(self) -> None:
        while not self._stopping.is_set():
            try:
                await asyncio.to_thread(self._uploads.sweep, at=self._now())
                if count := await asyncio.to_thread(self._files.sweep, at=self._now()):
                    log.warning("removed %d files that nobody owns any more", count)
            except StoreUnavailable:
                pass
            except OSError:
                log.exception("files could not be swept")
            await self._sleep(SWEEP_INTERVAL_S)

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)


def principal_of(store: Store, tenants: Tenants, key_id: str, at: datetime) -> Principal:
    """The key's principal at `at`. Raises Unauthenticated, TenantSuspended, StoreUnavailable."""
    with store.read() as connection:
        digest = connection.execute(sa.select(keys_table.c.digest).where(keys_table.c.id == key_id)).scalar()
    if digest is None:
        raise Unauthenticated()
    return tenants.keys.find(digest, at)
