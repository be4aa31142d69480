"""The use case: a generation request is admitted, and handed to a task that sees it through.

`Gateway.generate` reads as the request's life: resolve → price → admit → hold → dispatch; `generation.py`
has the rest: stream → settle.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from serve.billing.ledger.checkpoints import UsageCheckpoints
from serve.billing.ledger.ledger import Hold, HoldRequest, StaleQuote
from serve.billing.ledger.writer import CommitQueue
from serve.billing.metering.terms import BillingTerms
from serve.engine.protocol import Engine, Texts
from serve.errors import ModelNotFound, StoreUnavailable
from serve.inference.generation import Admitted, Generation, GenerationContext
from serve.inference.model_cache import ModelCache, PricedModel
from serve.inference.request import InferenceRequest
from serve.observability import logs
from serve.observability.metrics import Metrics
from serve.observability.tracing import OFF, Tracing
from serve.rate_limits import RateLimiter
from serve.registry.registry import AdapterRegistry
from serve.storage.database import Store
from serve.tenants import Principal

# A chat template adds a few tokens per message and at most a short default system prompt.
_TEMPLATE_TOKENS, _MESSAGE_TOKENS = 64, 16
_QUOTES_MAX = 5  # how often a price may change while one request is admitted


@dataclass(frozen=True, slots=True)
class _Quote:
    """What a call means, and its bounds in tokens, over all its prompts and samples."""

    priced_model: PricedModel
    context_tokens_max: int
    prompt_tokens_max: int
    completion_tokens_max: int

    @property
    def tokens_max(self) -> int:
        return self.prompt_tokens_max + self.completion_tokens_max


class Gateway:
    """Everything a request needs, as plain values and seams."""

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
    ) -> None:
        self._engines = engines
        self._rate_limiter = rate_limiter
        self._model_cache = ModelCache(store, registry)
        self.context = GenerationContext(
            commit_queue, checkpoints, metrics, request_timeout_s, first_token_timeout_s, now, tracing
        )
        self._running: set[asyncio.Task[None]] = set()

    async def generate(self, principal: Principal, request: InferenceRequest) -> Generation:
        """Admit `call`, dispatch it and return once the engine has accepted it.

        Raises:
            ModelNotFound, NotBillable, RateLimited, InsufficientCredit, StoreUnavailable, or what the call's
                keeper raises: nothing is held.
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
            self._model_cache.forget()
        raise StoreUnavailable()

    async def _start_once(self, principal: Principal, request: InferenceRequest) -> Generation:
        step = self.context.tracing.step
        with step("admission"):
            quote = self._quote(principal, request, await self._priced_model(principal, request))
            permit = await self._rate_limiter.admit(principal.subjects, tokens=quote.tokens_max)
        try:
            sale = self._terms(principal, request, quote)
            with step("hold"):
                await self._hold(principal, request, quote, sale)
        except BaseException:
            permit.release(0)
            raise
        admitted = Admitted(sale, quote.priced_model.model, permit, quote.context_tokens_max)
        generation = Generation(
            self.context, principal, request, admitted, self._engines[admitted.model.base]
        )
        task = asyncio.create_task(generation.run(), context=logs.context_of(generation.log_context))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return generation

    async def drain(self) -> None:
        """Wait until every admitted request is settled or voided."""
        while self._running:
            await asyncio.wait(set(self._running))

    async def _priced_model(self, principal: Principal, request: InferenceRequest) -> PricedModel:
        if not principal.may_use(request.model):
            raise ModelNotFound(request.model)
        tenant, now = principal.tenant, self.context.now()
        if (known := self._model_cache.known(tenant, request.model, now)) is not None:
            return known
        return await asyncio.to_thread(self._model_cache.look_up, tenant, request.model, now)

    def _quote(self, principal: Principal, request: InferenceRequest, priced_model: PricedModel) -> _Quote:
        """What the request may cost at most. Nothing is reserved yet."""
        limits = [subject.limits.context_tokens for subject in principal.subjects]
        own = self._engines[priced_model.model.base].context_tokens_max
        context = min([own, *(limit for limit in limits if limit is not None)])
        prompt = prompt_tokens_max(request, context)
        completion = min(request.sampling.completion_tokens_max or context, context) * request.choices
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
        # The lease outlasts every way in which a live gateway can still close the request itself.
        lease = timedelta(seconds=self.context.request_timeout_s + 120)
        also = None if request.commit_hook is None else partial(request.commit_hook.on_hold, at=at)
        await self.context.commit_queue.hold(HoldRequest(hold, at, lease, also, quote.priced_model.revision))


def prompt_tokens_max(request: InferenceRequest, context_tokens: int) -> int:
    """An upper bound on the prompt's tokens without a tokenizer.

    Byte-level and byte-fallback tokenizers make at most one token of each UTF-8 byte. What a template makes
    of tools is not known here: they count as a whole context.
    """
    if isinstance(request.prompt, Texts):
        texts = request.prompt.prompts
        sizes = (len(text.encode()) if isinstance(text, str) else len(text) for text in texts)
        return sum(min(size + 1, context_tokens) for size in sizes)
    if request.toolbox is not None or any(message.tool_calls for message in request.prompt):
        return context_tokens
    sizes = (len((message.content or "").encode()) + _MESSAGE_TOKENS for message in request.prompt)
    return min(_TEMPLATE_TOKENS + sum(sizes), context_tokens)


def _close_when_started(starting: "asyncio.Task[Generation]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
