"""One batch at work: validate it, run its lines, write its files.

Each step is repeatable: whoever takes the batch over, after whatever end of the worker before, goes on where
the store says the batch is.
"""

import asyncio
import logging
import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from time import monotonic

from serve.batches.batches import Batch, BatchStatus, LineError
from serve.batches.input import (
    ENDPOINTS,
    InputBounds,
    InputLine,
    numbered_lines,
    read_line,
    validate,
)
from serve.batches.lines import Attempt, LeaseLost, LineCommitHook, Lines
from serve.batches.output import write_output
from serve.batches.queue import BatchQueue
from serve.client_data.files import Files
from serve.errors import (
    BespokeError,
    EngineFailed,
    EngineLost,
    PermissionDenied,
    RateLimited,
    StoreUnavailable,
    Unavailable,
)
from serve.formats.errors import body_of, status_of
from serve.formats.shape import Json, whole_body
from serve.inference.gateway import Gateway
from serve.inference.request import GenerationResult
from serve.tenants import Principal

log = logging.getLogger(__name__)

LOST_MAX = 3  # replicas that one line may outlive: it may be what kills them
PAUSE_S_MIN, PAUSE_S_MAX = 0.5, 60.0
LOOK_S = 1.0


class Backoff:
    """When to go on after a refusal: later each time in a row, and never all at the same moment."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._refusals = 0

    @property
    def left_s(self) -> float:
        return self._until_s - monotonic()

    def begin(self, retry_after_s: float) -> None:
        if self.left_s > 0:
            return  # those in flight together are refused together
        wanted_s = max(retry_after_s, PAUSE_S_MIN * 2.0 ** min(self._refusals, 10))
        self._refusals += 1
        self._until_s = monotonic() + min(wanted_s, PAUSE_S_MAX) * random.uniform(1.0, 1.25)

    def end(self) -> None:
        self._refusals = 0


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """What the batches of a gateway share. `principal_of` blocks and raises Unauthenticated, TenantSuspended.

    `places` bounds the lines in flight; `pause` is for all, when engines or the store cannot take more.
    """

    gateway: Gateway
    work: BatchQueue
    lines: Lines
    files: Files
    bounds: InputBounds
    principal_of: Callable[[str, datetime], Principal]
    places: asyncio.Semaphore
    pause: Backoff
    stopping: asyncio.Event
    now: Callable[[], datetime]


class BatchRun:
    """Take it to its end with `go`, unless the worker stops or loses the lease."""

    def __init__(self, shop: RunnerContext, batch: Batch) -> None:
        self.batch = batch
        self._context = shop
        self._status: BatchStatus | None = batch.status
        self._pause = Backoff()  # the tenant's own limits
        self._lost: dict[int, int] = {}

    async def run(self) -> None:
        """Raises StoreUnavailable; then another attempt goes on from here."""
        while not self._context.stopping.is_set() and (status := await self.renew()) is not None:
            match status:
                case BatchStatus.VALIDATING:
                    await self._validate()
                case BatchStatus.IN_PROGRESS:
                    await self._execute()
                case _:
                    await self._end(status)

    async def renew(self) -> BatchStatus | None:
        """Keep the lease, and see how the batch stands; None if it is over or another's."""
        shop = self._context
        self._status = await asyncio.to_thread(shop.work.renew, self.batch.id, at=shop.now())
        return self._status

    async def _validate(self) -> None:
        shop, batch, at = self._context, self.batch, self._context.now()
        if at >= batch.expires_at:
            error = LineError("batch_expired", "The batch expired before it was validated.")
            await asyncio.to_thread(shop.work.fail, batch.id, [error], at=at)
            return

        def check() -> tuple[int, list[LineError]]:
            path = shop.files.path_of(batch.tenant, batch.input_file_id)
            return validate(path, batch.endpoint, shop.bounds)

        count, errors = await asyncio.to_thread(check)
        if errors:
            await asyncio.to_thread(shop.work.fail, batch.id, errors, at=shop.now())
        elif await asyncio.to_thread(shop.work.begin, batch.id, lines=count, at=shop.now()):
            self.batch = replace(batch, lines=count)

    async def _execute(self) -> None:
        """Run what has no result, again and again, until all has, or the batch may not go on."""
        shop, batch = self._context, self.batch
        while self._may_begin:
            await asyncio.to_thread(shop.lines.fence, batch.id, at=shop.now())
            done = await asyncio.to_thread(shop.lines.done, batch.id)
            if len(done) == batch.lines:
                break
            await self._pass(done)
        if self._status is BatchStatus.IN_PROGRESS and not shop.stopping.is_set():
            await asyncio.to_thread(shop.work.finalize, batch.id, at=shop.now())

    async def _pass(self, done: set[int]) -> None:
        """Each line without a result once. Ends when none is in flight."""
        shop, running = self._context, set[asyncio.Task[None]]()
        lines = numbered_lines(shop.files.path_of(self.batch.tenant, self.batch.input_file_id))
        try:
            while await self._ready() and (entry := await asyncio.to_thread(next, lines, None)) is not None:
                number, raw = entry
                if number in done:
                    continue
                await shop.places.acquire()
                if not self._may_begin:
                    shop.places.release()
                    break
                task = asyncio.create_task(self._line(number, raw))
                running.add(task)
                task.add_done_callback(running.discard)
                task.add_done_callback(lambda _task: shop.places.release())
        finally:
            lines.close()
            if running:
                await asyncio.wait(running)

    @property
    def _may_begin(self) -> bool:
        in_time = self._context.now() < self.batch.expires_at
        return self._status is BatchStatus.IN_PROGRESS and in_time and not self._context.stopping.is_set()

    async def _ready(self) -> bool:
        """Wait for a pause to end. False if nothing more may begin."""
        while self._may_begin and (left_s := max(self._pause.left_s, self._context.pause.left_s)) > 0:
            await asyncio.sleep(min(left_s, LOOK_S))
        return self._may_begin

    async def _line(self, number: int, raw: bytes) -> None:
        line = read_line(raw)
        request_id = f"req_{uuid.uuid4().hex}"
        attempt = Attempt(self.batch.id, self._context.work.owner, number, line.custom_id, request_id)
        try:
            await self._attempt(attempt, line)
            self._pause.end()
            self._context.pause.end()
        except LeaseLost:
            await self._look()
        except RateLimited as error:
            if error.retry_after_s is None:
                await self._refuse(attempt, error)
            else:
                self._pause.begin(error.retry_after_s)
        except Unavailable as error:
            self._lost[number] = self._lost.get(number, 0) + isinstance(error, EngineLost)
            if self._lost[number] >= LOST_MAX:
                await self._refuse(attempt, EngineFailed())
            self._context.pause.begin(error.retry_after_s)
        except BespokeError as error:
            await self._refuse(attempt, error)
        except Exception:
            log.exception("line %d of %s failed", number, self.batch.id)
            await self._refuse(attempt, BespokeError())

    async def _attempt(self, attempt: Attempt, line: InputLine) -> None:
        shop, batch = self._context, self.batch
        # Each time anew: a key that was revoked since runs nothing more.
        principal = await asyncio.to_thread(shop.principal_of, batch.key_id, shop.now())
        if "inference" not in principal.scopes:
            raise PermissionDenied("inference")
        endpoint = ENDPOINTS[batch.endpoint]

        def render(result: GenerationResult) -> Json:
            return whole_body(result, endpoint.shape())

        call = replace(
            endpoint.call(line.body, attempt.request_id, shop.bounds.fields),
            collect=True,
            survives_disconnect=True,
            tier="batch",
            commit_hook=LineCommitHook(attempt, render, body_of(EngineFailed())),
        )
        generation = await shop.gateway.generate(principal, call)
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()

    async def _refuse(self, attempt: Attempt, error: BespokeError) -> None:
        """A line's last word is an error, unless its settlement said so already."""
        status_code, _, _ = status_of(error)
        try:
            await asyncio.to_thread(self._context.lines.refuse, attempt, status_code, body_of(error))
        except LeaseLost:
            await self._look()
        except StoreUnavailable as away:  # the next pass says it again
            self._context.pause.begin(away.retry_after_s)

    async def _look(self) -> None:
        try:
            await self.renew()
        except StoreUnavailable as away:
            self._context.pause.begin(away.retry_after_s)

    async def _end(self, status: BatchStatus) -> None:
        """After the last attempt: none may be settled once the files are written."""
        shop, batch = self._context, self.batch
        await asyncio.to_thread(shop.lines.fence, batch.id, at=shop.now())
        end = BatchStatus.CANCELLED if status is BatchStatus.CANCELLING else BatchStatus.COMPLETED

        def write() -> None:
            write_output(batch, end, lines=shop.lines, files=shop.files, work=shop.work, at=shop.now())

        await asyncio.to_thread(write)
