"""The batch worker of one gateway: takes batches, keeps their leases, gives them back when it stops."""

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
from serve.errors import StoreUnavailable, Unauthenticated
from serve.inference.gateway import Gateway
from serve.storage.database import Store
from serve.tenants import Principal, Tenants, keys_table

log = logging.getLogger(__name__)

LEASE = timedelta(seconds=60)
AT_ONCE = 4  # batches: they share the places in flight, so a long one does not keep a short one waiting
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
        self._now = now
        self._stopping = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        owner = f"{socket.gethostname()[:30]}-{os.getpid()}-{secrets.token_hex(8)}"
        self._work = BatchQueue(store, files, owner, lease)
        self._context = RunnerContext(
            gateway=gateway,
            work=self._work,
            lines=Lines(store),
            files=files,
            bounds=bounds,
            principal_of=lambda key_id, at: principal_of(store, tenants, key_id, at),
            places=asyncio.Semaphore(requests_in_flight),
            pause=Backoff(),
            stopping=self._stopping,
            now=now,
        )

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Begin nothing more, wait for the lines in flight, give the leases back."""
        self._stopping.set()
        if self._loop is not None:
            await self._loop

    async def work(self) -> bool:
        """Take one batch as far as it goes now. False if there is none to take."""
        batch = await asyncio.to_thread(self._work.take, at=self._now())
        if batch is None:
            return False
        run = BatchRun(self._context, batch)
        keeping = asyncio.create_task(self._keep(run))
        try:
            await run.run()
        finally:
            keeping.cancel()
        await asyncio.to_thread(self._work.give_back, batch.id)
        return True

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._serve())
            group.create_task(self._sweep())

    async def _serve(self) -> None:
        while not self._stopping.is_set():
            try:
                if await self.work():
                    continue
            except StoreUnavailable:
                pass
            except Exception:  # the batch stays taken until its lease ends: it is not tried at once again
                log.exception("a batch could not go on")
            await self._sleep(self._idle_s)

    async def _keep(self, run: BatchRun) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            with contextlib.suppress(StoreUnavailable):  # a claim without the lease is refused anyhow
                await run.renew()

    async def _sweep(self) -> None:
        while not self._stopping.is_set():
            try:
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
    """Who the key stands for now. Raises Unauthenticated, TenantSuspended, StoreUnavailable."""
    with store.read() as connection:
        digest = connection.execute(sa.select(keys_table.c.digest).where(keys_table.c.id == key_id)).scalar()
    if digest is None:
        raise Unauthenticated()
    return tenants.keys.find(digest, at)
