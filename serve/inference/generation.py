"""Runs one admitted request: dispatches it, streams its deltas, and settles or voids its hold.

The generation runs in its own task, which no client can cancel. When the client leaves, the generation
stops the engine and settles the tokens that the engine reports. A request whose replica dies before the
first token is dispatched once more, unless it was stopped, or has a grammar or tools, which may be what
killed the replica (`quarantine.py`).
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from time import monotonic

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.holds import Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import FailedAttempt, UsageEvent
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Accepted, Delta, Engine, Event, Finished, GenerationRequest, Texts
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable, StoreUnavailable
from serve.inference import settlement
from serve.inference.answer import CollectedAnswer
from serve.inference.delta_buffer import DeltaBuffer
from serve.inference.quarantine import Quarantine, is_suspect
from serve.inference.request import GenerationResult, InferenceRequest
from serve.observability import logs
from serve.observability.metrics import Metrics, TokenLatency
from serve.observability.tracing import OFF, Tracing
from serve.rate_limits import Permit, RateLimitStatus
from serve.registry.versions import Model
from serve.tenants import Principal

log = logging.getLogger(__name__)

_ABORT_RETRY_S = 0.5
_ABORT_GRACE_S = 30.0


@dataclass(frozen=True, slots=True)
class Admitted:
    """Holds the decisions of admission: terms of billing, model, rate-limit permit, context length."""

    terms: BillingTerms
    model: Model
    permit: Permit
    context_tokens_max: int
    currency: str


@dataclass(frozen=True, slots=True)
class GenerationContext:
    """Holds what all generations of a gateway share.

    checkpoints: None loses the token counts of running requests if the gateway dies.
    """

    commit_queue: CommitQueue
    checkpoints: UsageCheckpoints | None
    metrics: Metrics
    request_timeout_s: float
    first_token_timeout_s: float
    now: Callable[[], datetime]
    tracing: Tracing = OFF
    quarantine: Quarantine | None = None


class Generation:
    """Runs one admitted request. Iterate it for deltas, then read `tokens`; always `close` it."""

    def __init__(
        self,
        context: GenerationContext,
        principal: Principal,
        request: InferenceRequest,
        admitted: Admitted,
        engine: Engine,
    ) -> None:
        self.request = request
        self.model = admitted.model
        self.answer = CollectedAnswer(request.choices) if request.collect else None
        self.created_at = context.now()
        self.failure: BespokeError | None = None  # the error that ended it
        operation = "text_completion" if isinstance(request.prompt, Texts) else "chat"
        if request.pooling is not None:
            operation = "embeddings"
        self._telemetry = context.tracing.generation(
            operation, request.model, admitted.model.base, request.sampling, request.request_id
        )
        self.log_context = logs.log_context()
        self._context = context
        self._principal = principal
        self._admitted = admitted
        self._engine = engine
        self._engine_request_id = request.request_id
        self._attempts = 0
        self._failed_attempts: list[FailedAttempt] = []
        self._adapter_version = admitted.model.adapter.model if admitted.model.adapter else None
        self._served_by: Accepted | None = None
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._last_batch: list[Delta] = []
        self._finish_reasons: list[str] = []
        self._finished: Finished | None = None
        self._accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._deltas = DeltaBuffer()
        self._started_at_s = monotonic()
        self._first_token_at_s: float | None = None
        self._token_latency = TokenLatency(request.choices)
        self._stop_cause: str | None = None
        self._abort_task: asyncio.Task[None] | None = None
        self._done = False

    @property
    def tokens(self) -> Tokens:
        """The tokens counted so far; after the end, the billed tokens."""
        return Tokens(self._prompt_tokens, self._cached_tokens, self._completion_tokens)

    @property
    def result(self) -> GenerationResult:
        """The outcome so far; `choices` only if the request collects them."""
        choices = self.answer.choices if self.answer is not None else ()
        return GenerationResult(self.request, self.model.name, self.created_at, self.tokens, choices)

    @property
    def rate_limit_status(self) -> RateLimitStatus | None:
        """The caller's remaining requests and tokens."""
        return self._admitted.permit.status

    @property
    def completion_tokens_granted(self) -> int | None:
        """The most tokens of a choice, if that is less than the client asked for."""
        asked = self.request.completion_tokens_asked
        most = self._served_by.completion_tokens_max if self._served_by else None
        return most if asked is not None and most is not None and most < asked else None

    async def wait_accepted(self) -> None:
        try:
            await asyncio.shield(self._accepted)
        except asyncio.CancelledError:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of deltas: all that wait at once. The last batch comes after the settlement.

        Raises EngineFailed.
        """
        return aiter(self._deltas)

    def close(self) -> None:
        """Stop the engine if it still runs; the client is gone or has the whole answer. Never blocks."""
        if not self.request.survives_disconnect:
            self._stop("disconnected")

    async def run(self) -> None:
        """Stream from the engine to the end, even if the client leaves; then settle or void."""
        metrics = self._context.metrics
        metrics.in_progress.inc()
        metrics.waiting.inc()
        self._accepted.add_done_callback(lambda _: metrics.waiting.dec())
        if self._context.checkpoints is not None:
            self._context.checkpoints.track(self.request.request_id, self._usage_so_far)
        failure = await self._stream()
        self._done = True
        self._telemetry.step("settlement")
        metrics.token_latency(self.model.base, self._adapter_version, self._token_latency)
        try:
            with metrics.settling():
                await self._settle_or_void(failure)
        except Exception:  # no client may wait for a bug; the hold's lease runs out
            log.exception("request %s is not closed", self.request.request_id)
        self._telemetry.end()
        self._admitted.permit.release(self._prompt_tokens + self._completion_tokens)
        metrics.in_progress.dec()
        if not self._accepted.done():
            self._accepted.set_exception(failure or EngineUnavailable())
            self._accepted.exception()  # retrieved: a client that left is not an unhandled error
        if self._finished is not None and self._last_batch:
            self._deltas.put(self._last_batch)
        self.failure = failure
        self._deltas.end(failure)

    async def _stream(self) -> BespokeError | None:
        """Dispatch the request and take the engine's events to their end. Returns the failure, if any."""
        call_later, limit_s = asyncio.get_running_loop().call_later, self._context.request_timeout_s
        with contextlib.ExitStack() as timers:
            timers.callback(call_later(limit_s, self._stop, "timeout").cancel)
            try:
                # The outer bound is for an engine that does not even answer a timer's abort.
                async with asyncio.timeout(limit_s + _ABORT_GRACE_S) as bound:
                    first_token_s = self._context.first_token_timeout_s
                    timers.callback(call_later(first_token_s, self._stop_if_no_token, bound).cancel)
                    await self._dispatch()
            except EngineLost as error:
                return EngineFailed() if self._output_started else error
            except BespokeError as error:
                return error
            except (Exception, asyncio.CancelledError) as error:  # a shutdown must not leave a hold open
                log.exception("request %s failed", self.request.request_id)
                failure = self._unfinished_error()
                failure.__cause__ = error
                return failure
        if self._finished is None:
            return self._unfinished_error()
        if self._finished.failed or (self._finished.aborted and self._stop_cause is None):
            return EngineFailed()
        return self._timeout_error() if self._finished.aborted else None

    async def _dispatch(self) -> None:
        """Attempt once, and once more if the replica died before the first token and nothing stopped it."""
        try:
            await self._attempt(self.request.request_id)
        except EngineLost as error:
            refused = await self._record_death()
            if self._output_started or self._stop_cause or refused or is_suspect(self.request):
                raise
            self._failed_attempts.append(self._failed_attempt(error))
            log.warning("request %s lost its replica and is tried again", self.request.request_id)
            self._context.metrics.retried()
            try:
                await self._attempt(f"{self.request.request_id}-2")
            except EngineLost:
                await self._record_death()
                raise
            await self._forgive()

    async def _record_death(self) -> bool:
        """Note in the store, before the client can retry, that a replica died with the request.

        Returns True if the request is in quarantine.
        """
        if (quarantine := self._context.quarantine) is None:
            return False
        try:
            at, boot = self._context.now(), self._served_by.boot if self._served_by else None
            record = quarantine.record_death
            quarantined = await asyncio.to_thread(record, self.request, self.model, at, boot)
        except StoreUnavailable:
            log.warning("the death of request %s's replica is not noted", self.request.request_id)
            return False
        if quarantined:
            self._context.metrics.quarantined()
            log.warning("request %s is in quarantine", self.request.request_id)
        return quarantined

    async def _forgive(self) -> None:
        if self._context.quarantine is not None:
            with contextlib.suppress(StoreUnavailable):
                await asyncio.to_thread(self._context.quarantine.forgive, self.request, self.model)

    async def _attempt(self, engine_request_id: str) -> None:
        """Stream from one replica, which knows the request as `engine_request_id`."""
        self._engine_request_id, self._served_by = engine_request_id, None
        self._attempts += 1
        self._telemetry.step("dispatch", attempt=self._attempts)
        await self._engine.generate(self._generation_request(), self._on_events)

    def _on_events(self, batch: list[Event]) -> None:
        self._last_batch = deltas = []
        for event in batch:
            match event:
                case Delta():
                    deltas.append(event)
                    self._completion_tokens += event.tokens
                    if event.finish_reason:
                        self._finish_reasons.append(event.finish_reason)
                case Finished():
                    self._finished = event
                    self._prompt_tokens, self._cached_tokens = event.prompt_tokens, event.cached_tokens
                    self._completion_tokens = event.completion_tokens
                case Accepted():
                    self._on_accepted(event)
        if not deltas:
            return
        self._token_latency.note(deltas)
        if self._first_token_at_s is None:
            self._record_first_token()
        if self.answer is not None:
            self.answer.take(deltas)
        if self._finished is None:
            self._deltas.put(deltas)

    @property
    def _output_started(self) -> bool:
        """True once a token was sent: the answer can be neither taken back nor started again."""
        return self._first_token_at_s is not None

    def _unfinished_error(self) -> BespokeError:
        """The error of a request that ends without a `Finished` event."""
        return self._timeout_error() or (EngineFailed() if self._accepted.done() else EngineUnavailable())

    def _timeout_error(self) -> BespokeError | None:
        match self._stop_cause:
            case "timeout":
                return EngineFailed("The request took longer than the server allows.")
            case "first_token_timeout":
                return EngineUnavailable("The model did not begin to answer in time.")
        return None

    def _generation_request(self) -> GenerationRequest:
        return GenerationRequest(
            self._engine_request_id,
            self.model.adapter,
            self.request.prompt,
            self.request.sampling,
            cache_salt=self._principal.tenant,
            toolbox=self.request.toolbox,
            reasoning_effort=self.request.reasoning_effort,
            collect=self.request.collect,
            context_tokens_max=self._admitted.context_tokens_max,
            trace_headers=self._telemetry.headers,
            pooling=self.request.pooling,
        )

    def _on_accepted(self, event: Accepted) -> None:
        self._served_by = event
        self._telemetry.step("first_token", replica=event.replica)
        self._prompt_tokens, self._cached_tokens, self._completion_tokens = event.prompt_tokens, 0, 0
        if not self._accepted.done():
            self._accepted.set_result(event)
        if self._stop_cause:
            self._abort()

    def _record_first_token(self) -> None:
        self._first_token_at_s = monotonic()
        self._telemetry.step("generation")
        waited_s = self._first_token_at_s - self._started_at_s
        self._context.metrics.ttft(self.model.base, self._adapter_version, waited_s)

    def _usage_so_far(self) -> RequestUsage | None:
        """The usage so far, for the checkpoint from which another process bills it if this one dies."""
        return None if self._served_by is None else self._request_usage(self._served_by)

    def _request_usage(self, by: Accepted) -> RequestUsage:
        return RequestUsage(by.replica, by.boot, self.tokens, self._attempts, by.cold_loads)

    def _failed_attempt(self, error: BespokeError) -> FailedAttempt:
        by = self._served_by
        return FailedAttempt(
            self.request.request_id,
            self._attempts,
            self._principal.tenant,
            self.model.name,
            by.replica if by else None,
            by.boot if by else None,
            type(error).__name__,
            self._context.now(),
        )

    def _stop(self, cause: str) -> None:
        if self._done or self._stop_cause:
            return
        self._stop_cause = cause
        if self._served_by is not None:
            self._abort()  # otherwise `_on_accepted` aborts

    def _stop_if_no_token(self, bound: asyncio.Timeout) -> None:
        if not self._output_started and not self._stop_cause:
            self._stop("first_token_timeout")
            bound.reschedule(asyncio.get_running_loop().time() + _ABORT_GRACE_S)

    def _abort(self) -> None:
        async def abort() -> None:
            while not self._done:
                try:
                    await self._engine.abort(self._engine_request_id)
                    return
                except (BespokeError, asyncio.CancelledError) as error:
                    log.warning("request %s is not aborted yet: %s", self.request.request_id, error)
                    await asyncio.sleep(_ABORT_RETRY_S)

        self._abort_task = asyncio.create_task(abort(), context=logs.context_of(self.log_context))

    async def _settle_or_void(self, failure: BespokeError | None) -> None:
        """Close the hold. If this process dies first, the checkpoint bills it."""
        at, served_by = self._context.now(), self._served_by
        # A prompt whose completion is to be empty is computed, and billed, once it is answered.
        answered = self.request.sampling.completion_tokens_max == 0 and self._finish_reasons
        if served_by is None or not (self._completion_tokens or answered):
            resolution = self._void_resolution(failure, at)
        else:
            resolution = self._settle_resolution(served_by, failure, at)
        await settlement.close(self._context.commit_queue, self._context.checkpoints, resolution)

    def _void_resolution(self, failure: BespokeError | None, at: datetime) -> Resolution:
        reason = type(failure).__name__ if failure else (self._stop_cause or "no tokens")
        self._telemetry.voided(reason, self._attempts)
        if failure is not None and self._attempts > len(self._failed_attempts):
            self._failed_attempts.append(self._failed_attempt(failure))
        self._prompt_tokens = self._cached_tokens = self._completion_tokens = 0
        self._context.metrics.closed(self.model.base, self._adapter_version, "void")
        hook = self.request.commit_hook
        return Resolution(
            self.request.request_id,
            self._principal.tenant,
            at,
            reason=reason,
            in_transaction=hook.on_void if hook else None,
            failed=tuple(self._failed_attempts),
        )

    def _settle_resolution(
        self, served_by: Accepted, failure: BespokeError | None, at: datetime
    ) -> Resolution:
        event = self._usage_event(served_by, failure, at)
        self._telemetry.settled(event, self._finish_reasons)
        self._context.metrics.closed(self.model.base, self._adapter_version, event.status.value)
        self._context.metrics.tokens(self.model.base, self._adapter_version, event.tokens)
        self._context.metrics.billed(self.model.base, event.cost_nanos, self._admitted.currency)
        if self._context.checkpoints is not None:
            self._context.checkpoints.note_end(event)
        in_transaction = settlement.commit_outcome(self.request.commit_hook, self.result, event.status)
        return Resolution(
            event.request_id,
            event.tenant,
            at,
            event=event,
            in_transaction=in_transaction,
            failed=tuple(self._failed_attempts),
        )

    def _usage_event(self, served_by: Accepted, failure: BespokeError | None, at: datetime) -> UsageEvent:
        status, reason = settlement.outcome(
            failure, self._stop_cause, self._finish_reasons, self.request.choices
        )
        first_s = self._first_token_at_s or monotonic()
        return self._admitted.terms.event(
            self.request.request_id,
            self._request_usage(served_by),
            status,
            reason,
            ttft_ms=round((first_s - self._started_at_s) * 1000),
            latency_ms=round((monotonic() - self._started_at_s) * 1000),
            at=at,
        )
