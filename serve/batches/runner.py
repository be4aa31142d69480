"""Runs one batch: validates it, runs its lines, writes its files.

Each step can be repeated: a worker that takes the batch over continues from the status in the store,
however the worker before it ended.
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
from serve.formats.response_format import Json, complete_body
from serve.inference.gateway import Gateway
from serve.inference.request import GenerationResult
from serve.tenants import Principal

log = logging.getLogger(__name__)

BACKOFF_S_MIN, BACKOFF_S_MAX = 0.5, 60.0
POLL_S_MAX = 1.0


class Backoff:
    """Tells how long to wait after a refusal: longer after each in a row, with jitter."""

    def __init__(self) -> None:
        self._until_s = 0.0
        self._refusals = 0

    @property
    def left_s(self) -> float:
        return self._until_s - monotonic()

    def begin(self, retry_after_s: float) -> None:
        if self.left_s > 0:
            return  # lines in flight together are refused together, which counts once
        delay_s = max(retry_after_s, BACKOFF_S_MIN * 2.0 ** min(self._refusals, 10))
        self._refusals += 1
        self._until_s = monotonic() + min(delay_s, BACKOFF_S_MAX) * random.uniform(1.0, 1.25)

    def end(self) -> None:
        self._refusals = 0


@dataclass(frozen=True, slots=True)
class RunnerContext:
    """Holds what the batches of one gateway share.

    principal_of: the key's principal at a time; blocks; raises Unauthenticated, TenantSuspended.
    line_slots: bounds the lines in flight. backoff: for all batches, when engines or the store are
    overloaded.
    """

    gateway: Gateway
    queue: BatchQueue
    lines: Lines
    files: Files
    bounds: InputBounds
    principal_of: Callable[[str, datetime], Principal]
    line_slots: asyncio.Semaphore
    backoff: Backoff
    stopping: asyncio.Event
    now: Callable[[], datetime]


class BatchRun:
    """Runs one batch to its end, unless the worker stops or loses the lease."""

    def __init__(self, context: RunnerContext, batch: Batch) -> None:
        self.batch = batch
        self._context = context
        self._status: BatchStatus | None = batch.status
        self._tenant_backoff = Backoff()  # for the tenant's own rate limits

    async def run(self) -> None:
        """Raises StoreUnavailable; a later run continues from the batch's status."""
        while not self._context.stopping.is_set() and (status := await self.renew()) is not None:
            match status:
                case BatchStatus.VALIDATING:
                    await self._validate()
                case BatchStatus.IN_PROGRESS:
                    await self._execute()
                case _:
                    await self._end(status)

    async def renew(self) -> BatchStatus | None:
        """Renew the lease. Returns the batch's status; None if it has ended or another worker has it."""
        context = self._context
        self._status = await asyncio.to_thread(context.queue.renew, self.batch.id, at=context.now())
        return self._status

    async def _validate(self) -> None:
        context, batch, at = self._context, self.batch, self._context.now()
        if at >= batch.expires_at:
            error = LineError("batch_expired", "The batch expired before it was validated.")
            await asyncio.to_thread(context.queue.fail, batch.id, [error], at=at)
            return

        def check() -> tuple[int, list[LineError]]:
            path = context.files.path_of(batch.tenant, batch.input_file_id)
            return validate(path, batch.endpoint, context.bounds)

        count, errors = await asyncio.to_thread(check)
        if errors:
            await asyncio.to_thread(context.queue.fail, batch.id, errors, at=context.now())
        elif await asyncio.to_thread(context.queue.begin, batch.id, lines=count, at=context.now()):
            self.batch = replace(batch, lines=count)

    async def _execute(self) -> None:
        """Run the lines without a result until all have one, or no more may begin."""
        context, batch = self._context, self.batch
        while self._may_begin:
            await asyncio.to_thread(context.lines.fence, batch.id, at=context.now())
            finished = await asyncio.to_thread(context.lines.finished_lines, batch.id)
            if len(finished) == batch.lines:
                break
            await self._run_unfinished(finished)
        if self._status is BatchStatus.IN_PROGRESS and not context.stopping.is_set():
            await asyncio.to_thread(context.queue.finalize, batch.id, at=context.now())

    async def _run_unfinished(self, finished: set[int]) -> None:
        """Attempt each line without a result once. Returns when no line is in flight."""
        context, running = self._context, set[asyncio.Task[None]]()
        lines = numbered_lines(context.files.path_of(self.batch.tenant, self.batch.input_file_id))
        try:
            while (
                await self._wait_for_backoff()
                and (entry := await asyncio.to_thread(next, lines, None)) is not None
            ):
                number, raw = entry
                if number in finished:
                    continue
                await context.line_slots.acquire()
                if not self._may_begin:
                    context.line_slots.release()
                    break
                task = asyncio.create_task(self._line(number, raw))
                running.add(task)
                task.add_done_callback(running.discard)
                task.add_done_callback(lambda _task: context.line_slots.release())
        finally:
            lines.close()
            if running:
                await asyncio.wait(running)

    @property
    def _may_begin(self) -> bool:
        in_time = self._context.now() < self.batch.expires_at
        return self._status is BatchStatus.IN_PROGRESS and in_time and not self._context.stopping.is_set()

    async def _wait_for_backoff(self) -> bool:
        """Wait until both backoffs are over. False if no more lines may begin."""
        backoffs = (self._tenant_backoff, self._context.backoff)
        while self._may_begin and (left_s := max(backoff.left_s for backoff in backoffs)) > 0:
            await asyncio.sleep(min(left_s, POLL_S_MAX))
        return self._may_begin

    async def _line(self, number: int, raw: bytes) -> None:
        line = await asyncio.to_thread(read_line, raw)
        request_id = f"req_{uuid.uuid4().hex}"
        attempt = Attempt(self.batch.id, self._context.queue.owner, number, line.custom_id, request_id)
        try:
            await self._attempt(attempt, line)
            self._tenant_backoff.end()
            self._context.backoff.end()
        except LeaseLost:
            await self._refresh_status()
        except RateLimited as error:
            if error.retry_after_s is None:
                await self._refuse(attempt, error)
            else:
                self._tenant_backoff.begin(error.retry_after_s)
        except Unavailable as error:
            if isinstance(error, EngineLost):  # the gateway has sent it again already, if it may be
                await self._refuse(attempt, EngineFailed())
            self._context.backoff.begin(error.retry_after_s)
        except BespokeError as error:
            await self._refuse(attempt, error)
        except Exception:
            log.exception("line %d of %s failed", number, self.batch.id)
            await self._refuse(attempt, BespokeError())

    async def _attempt(self, attempt: Attempt, line: InputLine) -> None:
        context, batch = self._context, self.batch
        # Read for every attempt: a revoked key runs no more lines.
        principal = await asyncio.to_thread(context.principal_of, batch.key_id, context.now())
        if "inference" not in principal.scopes:
            raise PermissionDenied("inference")
        endpoint = ENDPOINTS[batch.endpoint]

        def render(result: GenerationResult) -> Json:
            return complete_body(result, endpoint.response_format())

        fields = context.bounds.fields
        inference_request = replace(
            await asyncio.to_thread(endpoint.to_request, line.body, attempt.request_id, fields),
            collect=True,
            survives_disconnect=True,
            tier="batch",
            commit_hook=LineCommitHook(attempt, render, body_of(EngineFailed())),
        )
        generation = await context.gateway.generate(principal, inference_request)
        try:
            async for _ in generation:
                pass
        finally:
            generation.close()

    async def _refuse(self, attempt: Attempt, error: BespokeError) -> None:
        """Store the error as the line's result, unless its settlement did so already."""
        status_code, _, _ = status_of(error)
        try:
            await asyncio.to_thread(self._context.lines.refuse, attempt, status_code, body_of(error))
        except LeaseLost:
            await self._refresh_status()
        except StoreUnavailable as unavailable:  # the next pass attempts the line again
            self._context.backoff.begin(unavailable.retry_after_s)

    async def _refresh_status(self) -> None:
        try:
            await self.renew()
        except StoreUnavailable as unavailable:
            self._context.backoff.begin(unavailable.retry_after_s)

    async def _end(self, status: BatchStatus) -> None:
        """Write the files, after the last attempt: none may be settled once they are written."""
        context, batch = self._context, self.batch
        await asyncio.to_thread(context.lines.fence, batch.id, at=context.now())
        end = BatchStatus.CANCELLED if status is BatchStatus.CANCELLING else BatchStatus.COMPLETED

        def write() -> None:
            write_output(
                batch, end, lines=context.lines, files=context.files, queue=context.queue, at=context.now()
            )

        await asyncio.to_thread(write)
