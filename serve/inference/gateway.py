"""Admits generation requests, and starts a task that runs each of them to its settlement.

`Gateway.generate` is the first half of a request: resolve → price → admit → hold → dispatch.
`generation.py` is the second half: stream → settle.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.holds import Hold, HoldRequest, StaleQuote
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.terms import BillingTerms
from serve.engine.protocol import (
    EMBEDDING_TOKENS_MAX,
    Engine,
    Event,
    Finished,
    GenerationRequest,
    Pooling,
    Texts,
)
from serve.errors import InvalidRequest, ModelNotFound, RequestQuarantined, StoreUnavailable
from serve.inference.generation import Admitted, Generation, GenerationContext
from serve.inference.model_cache import ModelCache, PricedModel
from serve.inference.quarantine import Quarantine
from serve.inference.request import InferenceRequest
from serve.observability import logs
from serve.observability.metrics import Metrics
from serve.observability.tracing import OFF, Tracing
from serve.rate_limits import RateLimiter, RateLimitStatus
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import Model
from serve.storage.database import Store
from serve.tenants import Principal

# A chat template adds a few tokens per message and at most a short default system prompt.
_TEMPLATE_TOKENS, _MESSAGE_TOKENS = 64, 16
_QUOTES_MAX = 5  # how often a price may change while one request is admitted


@dataclass(frozen=True, slots=True)
class _Quote:
    """A request's model and price, and its bounds in tokens over all prompts and samples."""

    priced_model: PricedModel
    context_tokens_max: int
    prompt_tokens_max: int
    completion_tokens_max: int

    @property
    def tokens_max(self) -> int:
        return self.prompt_tokens_max + self.completion_tokens_max


class Gateway:
    """Runs generation requests on the engines of the bases.

    secret: keys the hashes of quarantined requests, the same for all gateways.
    checkpoints: where usage is written for the case that this process dies; None to write none.
    """

    def __init__(
        self,
        *,
        store: Store,
        registry: AdapterRegistry,
        engines: Mapping[str, Engine],
        rate_limiter: RateLimiter,
        commit_queue: CommitQueue,
        checkpoints: UsageCheckpoints | None,
        metrics: Metrics,
        request_timeout_s: float,
        first_token_timeout_s: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        tracing: Tracing = OFF,
        secret: bytes = b"",
    ) -> None:
        self._engines = engines
        self._rate_limiter = rate_limiter
        self._quarantine = Quarantine(store, secret)
        self._model_cache = ModelCache(store, registry, self._quarantine)
        self.context = GenerationContext(
            commit_queue,
            checkpoints,
            metrics,
            request_timeout_s,
            first_token_timeout_s,
            now,
            tracing,
            self._quarantine,
        )
        self._running: set[asyncio.Task[None]] = set()

    async def generate(self, principal: Principal, request: InferenceRequest) -> Generation:
        """Admit `request`, dispatch it and return once the engine has accepted it.

        Raises:
            ModelNotFound, NotBillable, RateLimited, InsufficientCredit, StoreUnavailable, or an error of the
                request's commit hook: nothing is held.
            RequestQuarantined: a replica died with the same request; nothing is held.
            ContextLengthExceeded, EngineUnavailable, Overloaded: the hold is voided.
        """
        starting = asyncio.create_task(self._start(principal, request))
        try:
            generation = await asyncio.shield(starting)  # a hold may be on its way to the store
        except asyncio.CancelledError:
            starting.add_done_callback(_close_when_started)
            raise
        await generation.wait_accepted()
        return generation

    async def _start(self, principal: Principal, request: InferenceRequest) -> Generation:
        logs.set_log_context(request.request_id)
        for _ in range(_QUOTES_MAX):
            with contextlib.suppress(StaleQuote):
                return await self._start_once(principal, request)
            self._model_cache.clear()
        raise StoreUnavailable()

    async def _start_once(self, principal: Principal, request: InferenceRequest) -> Generation:
        step = self.context.tracing.step
        with step("admission"):
            priced_model = await self._priced_model(principal, request)
            self._check_quarantine(request, priced_model.model)
            quote = self._quote(principal, request, priced_model)
            permit = await self._rate_limiter.admit(principal.subjects, tokens=quote.tokens_max)
        try:
            terms = self._terms(principal, request, quote)
            with step("hold"):
                await self._hold(principal, request, quote, terms)
        except BaseException:
            permit.release(0)
            raise
        model, currency = quote.priced_model.model, quote.priced_model.price.plan.currency
        admitted = Admitted(terms, model, permit, quote.context_tokens_max, currency)
        generation = Generation(
            self.context, principal, request, admitted, self._engines[admitted.model.base]
        )
        task = asyncio.create_task(generation.run(), context=logs.context_of(generation.log_context))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return generation

    async def count_prompt_tokens(
        self, principal: Principal, request: InferenceRequest
    ) -> tuple[int, RateLimitStatus | None]:
        """The tokens that `request`'s prompt would be billed for, and what the caller may still ask.

        The engine renders the prompt as it would to answer. Nothing is held or charged. A count is one of the
        caller's requests per minute. Raises ModelNotFound, NotBillable, RateLimited, InvalidRequest,
        EngineUnavailable, Overloaded, StoreUnavailable.
        """
        logs.set_log_context(request.request_id)
        self._require_use(principal, request)
        at = self.context.now()
        priced_model = await asyncio.to_thread(self._model_cache.load, principal.tenant, request.model, at)
        permit = await self._rate_limiter.admit(principal.subjects, tokens=0)
        try:
            model, events = priced_model.model, list[Event]()
            await self._engines[model.base].generate(
                GenerationRequest(
                    request.request_id,
                    model.adapter,
                    request.prompt,
                    request.sampling,
                    cache_salt=principal.tenant,
                    toolbox=request.toolbox,
                    reasoning_effort=request.reasoning_effort,
                    count_only=True,
                ),
                events.extend,
            )
        finally:
            permit.release(0)
        (count,) = (event.prompt_tokens for event in events if isinstance(event, Finished))
        return count, permit.status

    async def drain(self) -> None:
        """Wait until every admitted request is settled or voided."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def _priced_model(self, principal: Principal, request: InferenceRequest) -> PricedModel:
        self._require_use(principal, request)
        tenant, now = principal.tenant, self.context.now()
        if (priced_model := self._model_cache.get(tenant, request.model, now)) is not None:
            return priced_model
        return await asyncio.to_thread(self._model_cache.load, tenant, request.model, now)

    def _check_quarantine(self, request: InferenceRequest, model: Model) -> None:
        """The hold compares the revision afterwards, so an entry that is not loaded yet makes it stale."""
        try:
            self._quarantine.check(request, model, self.context.now())
        except RequestQuarantined:
            self.context.metrics.quarantine_refused()
            raise

    def _require_use(self, principal: Principal, request: InferenceRequest) -> None:
        if not principal.may_use(request.model):
            raise ModelNotFound(request.model)

    def _quote(self, principal: Principal, request: InferenceRequest, priced_model: PricedModel) -> _Quote:
        """The most tokens that the request may use. Nothing is reserved yet.

        Raises InvalidRequest if the model's base does not do what the request asks for.
        """
        engine = self._engines[priced_model.model.base]
        check_task(request, engine.embedding_size)
        limits = [subject.limits.context_tokens for subject in principal.subjects]
        context = min([engine.context_tokens_max, *(limit for limit in limits if limit is not None)])
        prompt = prompt_tokens_max(request, context)
        most = request.sampling.completion_tokens_max
        completion = (context if most is None else min(most, context)) * request.choices
        return _Quote(priced_model, context, prompt, completion)

    def _terms(self, principal: Principal, request: InferenceRequest, quote: _Quote) -> BillingTerms:
        model, price = quote.priced_model.model, quote.priced_model.price
        rates = price.rates(
            model=model.name, adapter=model.adapter is not None, batch=request.tier == "batch"
        )
        return BillingTerms(
            tenant=principal.tenant,
            key_id=principal.key_id,
            project=principal.project,
            model=model.name,
            base=model.base,
            adapter_version=model.adapter.model if model.adapter else None,
            plan_id=price.id,
            rates=rates,
            samples=request.sampling.n,
            tier=request.tier,
            rerun_if_lost=request.survives_disconnect,
        )

    async def _hold(
        self, principal: Principal, request: InferenceRequest, quote: _Quote, terms: BillingTerms
    ) -> None:
        hold = Hold(
            request.request_id,
            principal.tenant,
            terms.rates.cost_nanos_max(quote.prompt_tokens_max, quote.completion_tokens_max),
            project=principal.project,
            key_id=principal.key_id,
            terms=terms.to_json(),
            owner=self.context.checkpoints.name if self.context.checkpoints else None,
        )
        at = self.context.now()
        # The lease is longer than any way a live gateway can take to close the request itself.
        lease = timedelta(seconds=self.context.request_timeout_s + 120)
        in_transaction = None if request.commit_hook is None else partial(request.commit_hook.on_hold, at=at)
        await self.context.commit_queue.hold(
            HoldRequest(hold, at, lease, in_transaction, quote.priced_model.revision)
        )


def check_task(request: InferenceRequest, embedding_size: int | None) -> None:
    """Raises InvalidRequest if text is asked of a base that makes embeddings, or the other way round."""
    pooling, model = request.pooling, request.model
    if embedding_size is None and pooling is not None:
        text = f"The model '{model}' generates text and makes no embeddings."
        raise InvalidRequest(text, "model", "unsupported_model")
    if embedding_size is None:
        return
    if pooling is None:
        text = f"The model '{model}' makes embeddings and generates no text: use /v1/embeddings."
        raise InvalidRequest(text, "model", "unsupported_model")
    if pooling.dimensions is not None and pooling.dimensions > embedding_size:
        text = f"'dimensions' is at most {embedding_size}, the length of the model's embeddings."
        raise InvalidRequest(text, "dimensions", "invalid_value")


def prompt_tokens_max(request: InferenceRequest, context_tokens: int) -> int:
    """An upper bound on the prompt's tokens, without a tokenizer.

    Byte-level and byte-fallback tokenizers make at most one token of each UTF-8 byte. A chat template's
    text for tools is not known here, so a request with tools counts as a full context.
    """
    if isinstance(request.prompt, Texts):
        texts = request.prompt.prompts
        if request.pooling is not None:
            return _embedded_tokens_max(texts, request.pooling, context_tokens)
        sizes = (len(text.encode()) if isinstance(text, str) else len(text) for text in texts)
        return sum(min(size + 1, context_tokens) for size in sizes)
    if request.toolbox is not None or any(message.tool_calls for message in request.prompt):
        return context_tokens
    sizes = (len((message.content or "").encode()) + _MESSAGE_TOKENS for message in request.prompt)
    return min(_TEMPLATE_TOKENS + sum(sizes), context_tokens)


def _embedded_tokens_max(
    texts: Sequence[str | tuple[int, ...]], pooling: Pooling, context_tokens: int
) -> int:
    """Counts a text's tokens by its bytes, and the two that a BERT tokenizer puts around it."""
    kept = pooling.truncate_tokens
    longest = context_tokens if kept is None or kept < 0 else min(kept, context_tokens)
    sizes = (len(text.encode(errors="replace")) + 2 if isinstance(text, str) else len(text) for text in texts)
    return min(sum(min(size, longest) for size in sizes), EMBEDDING_TOKENS_MAX)


def _close_when_started(starting: "asyncio.Task[Generation]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
