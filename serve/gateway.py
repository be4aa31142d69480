"""The use case: a generation request is admitted, and handed to a task that sees it through.

`Gateway.generate` reads as the request's life: resolve → price → hold → dispatch; `generation.py` has the
rest: stream → settle.
"""

import asyncio
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from serve.adapters import Catalogue
from serve.billing.ledger import Hold, Ledger
from serve.billing.pricing import Prices
from serve.db import Store
from serve.engine.base import Engine, Message
from serve.errors import NotBillable
from serve.generation import Admitted, Call, Generation, Terms, detached
from serve.metrics import Metrics
from serve.tenants import Principal

# A chat template adds a few tokens per message and at most a short default system prompt.
_TEMPLATE_TOKENS, _MESSAGE_TOKENS = 64, 16


class Gateway:
    """Everything a request needs, as plain values and seams."""

    def __init__(
        self,
        *,
        store: Store,
        catalogue: Catalogue,
        engines: Mapping[str, Engine],
        metrics: Metrics,
        request_timeout_s: float,
        first_token_timeout_s: float,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._engines = engines
        self._prices = Prices(store)
        self.terms = Terms(Ledger(store), metrics, request_timeout_s, first_token_timeout_s, now)
        self._running: set[asyncio.Task[None]] = set()

    async def generate(self, principal: Principal, call: Call) -> Generation:
        """Admit `call`, dispatch it and return once the engine has accepted it.

        Raises:
            ModelNotFound, NotBillable, InsufficientCredit, StoreUnavailable: nothing is held.
            ContextLengthExceeded, EngineUnavailable, Overloaded: the hold is voided.
        """
        starting = asyncio.create_task(self._start(principal, call))
        try:
            generation = await asyncio.shield(starting)  # a hold may be on its way to the store
        except asyncio.CancelledError:
            starting.add_done_callback(_close_when_started)
            raise
        await generation.wait_accepted()
        return generation

    async def _start(self, principal: Principal, call: Call) -> Generation:
        admitted = await asyncio.to_thread(self._admit, principal, call)
        generation = Generation(self.terms, principal, call, admitted, self._engines[admitted.model.base])
        task = asyncio.create_task(generation.run(), context=detached())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return generation

    async def void_expired(self) -> int:
        """Give back what requests of dead gateways still hold; see `Ledger.void_expired`."""
        return await asyncio.to_thread(self.terms.ledger.void_expired, at=self.terms.now())

    async def drain(self) -> None:
        """Wait until every admitted request is settled or voided."""
        while self._running:
            await asyncio.wait(set(self._running))

    def _admit(self, principal: Principal, call: Call) -> Admitted:
        at = self.terms.now()
        with self._store.read() as connection:
            model = self._catalogue.resolve(connection, principal.tenant, call.model)
            price = self._prices.at(connection, principal.tenant, at)
        if price is None:
            raise NotBillable(principal.tenant)
        context = self._engines[model.base].context_tokens_max
        completion = min(call.sampling.completion_tokens_max or context, context)
        rates = price.rates(adapter=model.adapter is not None)
        most = rates.cost_nanos_max(prompt_tokens_max(call.prompt, context), completion * call.sampling.n)
        hold = Hold(call.request_id, principal.tenant, most)
        # The lease outlasts every way in which a live gateway can still close the request itself.
        lease = timedelta(seconds=self.terms.request_timeout_s + 120)
        with self._store.write() as connection:
            self.terms.ledger.hold(connection, hold, at=at, lease=lease)
        return Admitted(hold, model, price)


def prompt_tokens_max(prompt: tuple[Message, ...] | str, context_tokens: int) -> int:
    """An upper bound on the prompt's tokens without a tokenizer.

    Byte-level and byte-fallback tokenizers make at most one token of each UTF-8 byte.
    """
    if isinstance(prompt, str):
        bound = len(prompt.encode()) + 1
    else:
        bound = _TEMPLATE_TOKENS + sum(len(m.content.encode()) + _MESSAGE_TOKENS for m in prompt)
    return min(bound, context_tokens)


def _close_when_started(starting: "asyncio.Task[Generation]") -> None:
    if not starting.cancelled() and starting.exception() is None:
        starting.result().close()
