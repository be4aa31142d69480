"""One generation request, admitted: from its dispatch to its settlement.

It runs in a task of its own, which no client can cancel: a client that goes away makes it stop the engine,
and then it settles what the engine says was generated. A request whose replica dies before the first token
is dispatched once more, as long as somebody waits for it.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from time import monotonic

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.ledger import Resolution
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.events import FailedAttempt, UsageEvent
from serve.billing.metering.terms import BillingTerms, RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import Accepted, Delta, Engine, Event, Finished, GenerationRequest, Texts
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable
from serve.inference import settlement
from serve.inference.request import CollectedAnswer, DeltaBuffer, GenerationResult, InferenceRequest
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
    """What was decided before anything is computed, and is held to afterwards."""

    terms: BillingTerms
    model: Model
    permit: Permit
    context_tokens_max: int


@dataclass(frozen=True, slots=True)
class GenerationContext:
    """What all generations of a gateway share. Without a journal, a gateway that dies forgets its counts."""

    commit_queue: CommitQueue
    checkpoints: UsageCheckpoints | None
    metrics: Metrics
    request_timeout_s: float
    first_token_timeout_s: float
    now: Callable[[], datetime]
    tracing: Tracing = OFF


class Generation:
    """One admitted request. Iterate it for deltas, then read `tokens`; always `close` it."""

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
        self.failure: BespokeError | None = None  # that ended it
        operation = "text_completion" if isinstance(request.prompt, Texts) else "chat"
        self._telemetry = context.tracing.generation(
            operation, request.model, admitted.model.base, request.sampling, request.request_id
        )
        self.log_context = logs.log_context()
        self._context = context
        self._principal = principal
        self._admitted = admitted
        self._engine = engine
        self._engine_id = request.request_id
        self._attempts = 0
        self._failed: list[FailedAttempt] = []
        self._version = admitted.model.adapter.model if admitted.model.adapter else None
        self._served_by: Accepted | None = None
        self._prompt = self._cached = self._completion = 0  # tokens
        self._last: list[Delta] = []
        self._reasons: list[str] = []
        self._finished: Finished | None = None
        self._accepted: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
        self._deltas = DeltaBuffer()
        self._started_s = monotonic()
        self._first_token_s: float | None = None
        self._token_latency = TokenLatency(request.choices)
        self._stopped: str | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._done = False

    @property
    def tokens(self) -> Tokens:
        """What was counted until now; once it is over, what is billed."""
        return Tokens(self._prompt, self._cached, self._completion)

    @property
    def result(self) -> GenerationResult:
        """Holds what has come until now; `choices` only if the request collects them."""
        choices = self.answer.choices if self.answer is not None else ()
        return GenerationResult(self.request, self.model.name, self.created_at, self.tokens, choices)

    @property
    def rate_limit_status(self) -> RateLimitStatus | None:
        """What is left of the caller's limits."""
        return self._admitted.permit.status

    async def wait_accepted(self) -> None:
        try:
            await asyncio.shield(self._accepted)
        except asyncio.CancelledError:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """Batches of deltas, all that wait at once. The last batch comes after the settlement.

        Raises EngineFailed.
        """
        return aiter(self._deltas)

    def close(self) -> None:
        """The client is gone or has everything: stop the engine if it still runs. Never blocks."""
        if not self.request.survives_disconnect:
            self._stop("disconnected")

    async def run(self) -> None:
        """Stream from the engine to its end, whatever the client does, then settle or void."""
        metrics = self._context.metrics
        metrics.in_progress.inc()
        metrics.waiting.inc()
        self._accepted.add_done_callback(lambda _: metrics.waiting.dec())
        if self._context.checkpoints is not None:
            self._context.checkpoints.track(self.request.request_id, self._used)
        failure = await self._listen()
        self._done = True
        self._telemetry.step("settlement")
        metrics.token_latency(self.model.base, self._version, self._token_latency)
        try:
            with metrics.settling():
                await self._settle_or_void(failure)
        except Exception:  # nobody may wait for a bug; the hold's lease runs out
            log.exception("request %s is not closed", self.request.request_id)
        self._telemetry.end()
        self._admitted.permit.release(self._prompt + self._completion)
        metrics.in_progress.dec()
        if not self._accepted.done():
            self._accepted.set_exception(failure or EngineUnavailable())
            self._accepted.exception()  # retrieved: a client that left is not an unhandled error
        if self._finished is not None and self._last:
            self._deltas.put(self._last)
        self.failure = failure
        self._deltas.end(failure)

    async def _listen(self) -> BespokeError | None:
        """Take in all that the engine says; returns what went wrong, if anything did."""
        call_later, limit_s = asyncio.get_running_loop().call_later, self._context.request_timeout_s
        with contextlib.ExitStack() as watchdogs:
            watchdogs.callback(call_later(limit_s, self._stop, "timeout").cancel)
            try:
                # The outer bound is for an engine that does not even answer a watchdog's abort.
                async with asyncio.timeout(limit_s + _ABORT_GRACE_S) as bound:
                    first_token_s = self._context.first_token_timeout_s
                    watchdogs.callback(call_later(first_token_s, self._stop_unbegun, bound).cancel)
                    await self._dispatch()
            except EngineLost as error:
                return EngineFailed() if self._begun else error
            except BespokeError as error:
                return error
            except (Exception, asyncio.CancelledError) as error:  # even a shutdown leaves no hold behind
                log.exception("request %s failed", self.request.request_id)
                failure = self._broken()
                failure.__cause__ = error
                return failure
        if self._finished is None:
            return self._broken()
        if self._finished.failed or (self._finished.aborted and self._stopped is None):
            return EngineFailed()
        return self._too_late() if self._finished.aborted else None

    async def _dispatch(self) -> None:
        """Once, and once more if the replica died with nothing out yet and the answer still wanted."""
        try:
            await self._attempt(self.request.request_id)
        except EngineLost as error:
            if self._begun or self._stopped:
                raise
            self._failed.append(self._failure(error))
            log.warning("request %s lost its replica and is tried again", self.request.request_id)
            self._context.metrics.retried()
            await self._attempt(f"{self.request.request_id}-2")

    async def _attempt(self, engine_id: str) -> None:
        """Stream from a replica, which knows the request as `engine_id`."""
        self._engine_id, self._served_by = engine_id, None
        self._attempts += 1
        self._telemetry.step("dispatch", attempt=self._attempts)
        await self._engine.generate(self._request(), self._on_events)

    def _on_events(self, batch: list[Event]) -> None:
        self._last = deltas = []
        for event in batch:
            match event:
                case Delta():
                    deltas.append(event)
                    self._completion += event.tokens
                    if event.finish_reason:
                        self._reasons.append(event.finish_reason)
                case Finished():
                    self._finished = event
                    self._prompt, self._cached = event.prompt_tokens, event.cached_tokens
                    self._completion = event.completion_tokens
                case Accepted():
                    self._accept(event)
        if not deltas:
            return
        self._token_latency.note(deltas)
        if self._first_token_s is None:
            self._note_first_token()
        if self.answer is not None:
            self.answer.take(deltas)
        if self._finished is None:
            self._deltas.put(deltas)

    @property
    def _begun(self) -> bool:
        """Something of the answer is out: it can be neither taken back nor begun anew."""
        return self._first_token_s is not None

    def _broken(self) -> BespokeError:
        """What a request dies of that ends without the engine's last word."""
        return self._too_late() or (EngineFailed() if self._accepted.done() else EngineUnavailable())

    def _too_late(self) -> BespokeError | None:
        match self._stopped:
            case "timeout":
                return EngineFailed("The request took longer than the server allows.")
            case "first_token_timeout":
                return EngineUnavailable("The model did not begin to answer in time.")
        return None

    def _request(self) -> GenerationRequest:
        return GenerationRequest(
            self._engine_id,
            self.model.adapter,
            self.request.prompt,
            self.request.sampling,
            cache_salt=self._principal.tenant,
            length_param=self.request.length_param,
            toolbox=self.request.toolbox,
            reasoning_effort=self.request.reasoning_effort,
            collect=self.request.collect,
            context_tokens_max=self._admitted.context_tokens_max,
            trace_headers=self._telemetry.headers,
        )

    def _accept(self, event: Accepted) -> None:
        self._served_by = event
        self._telemetry.step("first_token", replica=event.replica)
        self._prompt, self._cached, self._completion = event.prompt_tokens, 0, 0
        if not self._accepted.done():
            self._accepted.set_result(event)
        if self._stopped:
            self._abort()

    def _note_first_token(self) -> None:
        self._first_token_s = monotonic()
        self._telemetry.step("generation")
        waited_s = self._first_token_s - self._started_s
        self._context.metrics.ttft(self.model.base, self._version, waited_s)

    def _used(self) -> RequestUsage | None:
        """What was counted until now: should this process die, somebody else must bill it."""
        return None if self._served_by is None else self._served(self._served_by)

    def _served(self, by: Accepted) -> RequestUsage:
        return RequestUsage(by.replica, by.boot, self.tokens, self._attempts, by.cold_loads)

    def _failure(self, error: BespokeError) -> FailedAttempt:
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

    def _stop(self, why: str) -> None:
        if self._done or self._stopped:
            return
        self._stopped = why
        if self._served_by is not None:
            self._abort()  # otherwise as soon as the engine has accepted

    def _stop_unbegun(self, bound: asyncio.Timeout) -> None:
        if not self._begun and not self._stopped:
            self._stop("first_token_timeout")
            bound.reschedule(asyncio.get_running_loop().time() + _ABORT_GRACE_S)

    def _abort(self) -> None:
        async def abort() -> None:
            while not self._done:
                try:
                    await self._engine.abort(self._engine_id)
                    return
                except (BespokeError, asyncio.CancelledError) as error:
                    log.warning("request %s is not aborted yet: %s", self.request.request_id, error)
                    await asyncio.sleep(_ABORT_RETRY_S)

        self._stopping = asyncio.create_task(abort(), context=logs.context_of(self.log_context))

    async def _settle_or_void(self, failure: BespokeError | None) -> None:
        """Close the hold; the journal knows, if this process dies first."""
        at, served_by = self._context.now(), self._served_by
        if served_by is None or self._completion == 0:
            closing = self._void(failure, at)
        else:
            closing = self._settlement(served_by, failure, at)
        await settlement.close(self._context.commit_queue, self._context.checkpoints, closing)

    def _void(self, failure: BespokeError | None, at: datetime) -> Resolution:
        reason = type(failure).__name__ if failure else (self._stopped or "no tokens")
        self._telemetry.voided(reason, self._attempts)
        if failure is not None and self._attempts > len(self._failed):
            self._failed.append(self._failure(failure))
        self._prompt = self._cached = self._completion = 0
        self._context.metrics.closed(self.model.base, self._version, "void")
        hook = self.request.commit_hook
        return Resolution(
            self.request.request_id,
            self._principal.tenant,
            at,
            reason=reason,
            in_transaction=hook.on_void if hook else None,
            failed=tuple(self._failed),
        )

    def _settlement(self, served_by: Accepted, failure: BespokeError | None, at: datetime) -> Resolution:
        event = self._event(served_by, failure, at)
        self._telemetry.settled(event, self._reasons)
        self._context.metrics.closed(self.model.base, self._version, event.status.value)
        self._context.metrics.tokens(self.model.base, self._version, event.tokens)
        self._context.metrics.billed(self.model.base, event.cost_nanos)
        if self._context.checkpoints is not None:
            self._context.checkpoints.note_end(event)
        also = settlement.commit_outcome(self.request.commit_hook, self.result, event.status)
        return Resolution(
            event.request_id, event.tenant, at, event=event, in_transaction=also, failed=tuple(self._failed)
        )

    def _event(self, served_by: Accepted, failure: BespokeError | None, at: datetime) -> UsageEvent:
        status, reason = settlement.outcome(failure, self._stopped, self._reasons, self.request.choices)
        first_s = self._first_token_s or monotonic()
        return self._admitted.terms.event(
            self.request.request_id,
            self._served(served_by),
            status,
            reason,
            ttft_ms=round((first_s - self._started_s) * 1000),
            latency_ms=round((monotonic() - self._started_s) * 1000),
            at=at,
        )
