"""Runs a base that makes embeddings in vLLM: its pooling runner, behind the Engine protocol."""

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, cast

from quantize.card import read_card
from serve.billing.metering.terms import RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.engine.protocol import (
    EMBEDDING_TOKENS_MAX,
    Accepted,
    GenerationRequest,
    Pooling,
    Sampling,
    Take,
    Texts,
)
from serve.engine.vllm import upstream
from serve.engine.vllm.embeddings import EmbeddingRun
from serve.engine.vllm.engine import VllmEngine
from serve.engine.vllm.grammar_gate import GrammarGate, VerdictCache
from serve.engine.vllm.grammar_process import GrammarProcess
from serve.engine.vllm.prompts import refusal_of
from serve.engine.vllm.setup import pooling_args, prepare_environment
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    InvalidRequest,
)
from serve.observability import logs
from serve.observability.tracing import prepare_vllm, trace_id_of, traces_url
from serve.settings import EngineSettings

log = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 32  # are tokenized before other requests get their turn


class TextTokenizer:
    """Tokenizes texts exactly as the base's own tokenizer does, in one thread, for one AsyncLLM."""

    def __init__(self, llm: Any) -> None:
        self.tokenizer = llm.renderer.get_tokenizer()
        self._vocabulary = int(llm.model_config.get_vocab_size())
        self.context_tokens_max = int(llm.model_config.max_model_len)
        # transformers' tokenizers keep the truncation of a call, so two threads must not use one.
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def ids_of(self, request: GenerationRequest) -> list[Sequence[int]]:
        """Returns each text's token ids. Raises InvalidRequest, ContextLengthExceeded."""
        pooling, texts = request.pooling, request.prompt
        if pooling is None or not isinstance(texts, Texts):
            raise InvalidRequest("This model makes embeddings and generates no text.", "model")
        limit = min(self.context_tokens_max, request.context_tokens_max or self.context_tokens_max)
        kept = _kept(pooling, limit)
        loop, prompts = asyncio.get_running_loop(), list[Sequence[int]]()
        for start in range(0, len(texts.prompts), _TEXTS_AT_ONCE):
            some = texts.prompts[start : start + _TEXTS_AT_ONCE]
            prompts += await loop.run_in_executor(self._thread, self._tokenize, some, kept)
        for number, ids in enumerate(prompts):
            self._check(ids, f"input.{number}" if len(prompts) > 1 else "input", limit)
        if (total := sum(map(len, prompts))) > EMBEDDING_TOKENS_MAX:
            text = f"The input has {total} tokens. A request has at most {EMBEDDING_TOKENS_MAX}."
            raise InvalidRequest(text, "input", "max_tokens_per_request")
        return prompts

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _tokenize(self, texts: Sequence[str | tuple[int, ...]], kept: int | None) -> list[Sequence[int]]:
        cut: dict[str, Any] = {"truncation": kept is not None, "max_length": kept, "padding": False}
        return [
            self.tokenizer(text, **cut)["input_ids"] if isinstance(text, str) else text[:kept]
            for text in texts
        ]

    def _check(self, ids: Sequence[int], param: str, limit: int) -> None:
        if not ids:
            raise InvalidRequest(f"'{param}' is empty.", param, "invalid_value")
        if len(ids) > limit:
            raise ContextLengthExceeded(limit, len(ids), 0, param)
        if (largest := max(ids)) >= self._vocabulary:
            text = f"'{param}' has the token id {largest}, and the model has {self._vocabulary} tokens."
            raise InvalidRequest(text, param, "invalid_value")


class PoolingEngine(VllmEngine):
    """Owns one AsyncLLM that makes embeddings, and its counters. It has no adapters. Make it with `start`."""

    @classmethod
    async def start(
        cls,
        base: str,
        base_dir: Path,
        adapters_dir: Path,
        settings: EngineSettings,
        replica: str,
        otlp_endpoint: str | None = None,
    ) -> "PoolingEngine":
        """Loads the base and proves with one real request that it answers. Takes tens of seconds."""
        prepare_environment(settings)
        prepare_vllm(otlp_endpoint)
        card = read_card(base_dir)
        assert card.embedding is not None
        facts = card.embedding
        llm = upstream.start_llm(
            model=str(base_dir),
            served_model_name=base,
            pooler_config=upstream.pooler_config(facts.pooling, normalized=facts.normalized),
            otlp_traces_endpoint=traces_url(otlp_endpoint) if otlp_endpoint else None,
            **pooling_args(settings, card.max_context_tokens),
        )
        engine = cls(llm, TextTokenizer(llm), base, replica)
        await engine.check_vector(facts.size)
        return engine

    def __init__(self, llm: Any, texts: TextTokenizer, base: str, replica: str) -> None:
        # Neither is used here: no prompt has a template, and no answer a grammar, so no process starts.
        renderer, gate = cast(Any, texts), GrammarGate(GrammarProcess(), VerdictCache(0))
        super().__init__(llm, renderer, gate, base, replica)
        self._texts = texts
        self._runs: dict[str, EmbeddingRun] = {}

    async def check_vector(self, size: int) -> None:
        """Makes a vector that is billed to nobody. Raises EngineUnavailable unless it has `size` numbers."""
        number = f"probe-{uuid.uuid4().hex}"
        sampling = Sampling(completion_tokens_max=0)
        request = GenerationRequest(number, None, Texts(("Hello",)), sampling, number, pooling=Pooling())
        run = self._run_of(request, await self._texts.ids_of(request))
        await run.run()
        self._probe_tokens = (self._probe_tokens[0] + run.prompt_tokens, self._probe_tokens[1])
        delta = run.events[0]
        if len(getattr(delta, "embedding", b"")) != 4 * size:
            raise EngineUnavailable(f"The base '{self._base}' makes no vectors of {size} numbers.")

    async def logprobs(self, adapter: object, format: object = None) -> NoReturn:
        """Raises EngineUnavailable: there is no next token, and no adapter that could change it."""
        raise EngineUnavailable("This base is served without adapters.")

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """See `serve.engine.protocol.Engine.generate`. Cancelled, it ends the request."""
        logs.set_log_context(request.request_id, trace_id=trace_id_of(request.trace_headers))
        prompts = await self._texts.ids_of(request)
        run = self._run_of(request, prompts)

        def count() -> RequestUsage:
            return RequestUsage(self._replica, self._boot, Tokens(run.prompt_tokens, 0, 0))

        with self._usage_log.recording(request.request_id, count):
            self._runs[request.request_id] = run
            try:
                take([Accepted(self._replica, self._boot, sum(map(len, prompts)))])
                await run.run()
                take(run.events)
            except Exception as error:
                if refusal := refusal_of(error):
                    raise refusal from error
                log.exception("request %s failed in vLLM", request.request_id)
                raise (EngineLost() if self._llm.errored else EngineFailed()) from error
            finally:
                del self._runs[request.request_id]
                run.abort()
                await self._abort(run.queues)

    def _run_of(self, request: GenerationRequest, prompts: list[Sequence[int]]) -> EmbeddingRun:
        assert request.pooling is not None

        async def add(part: int) -> Any:
            name = f"{request.request_id}.{part}"
            return await self._llm.add_request(
                name,
                upstream.tokens_input(prompts[part]),
                upstream.embedding_params(),
                trace_headers=request.trace_headers,
            )

        return EmbeddingRun(prompts, request.pooling.dimensions, add)

    async def abort(self, request_id: str) -> None:
        if (run := self._runs.get(request_id)) is not None:
            run.abort()
            await self._abort(run.queues)

    def shutdown(self) -> None:
        with contextlib.suppress(BespokeError):
            super().shutdown()
        self._texts.close()


def _kept(pooling: Pooling, limit: int) -> int | None:
    """Returns to how many tokens a longer text is cut; None refuses it. Raises InvalidRequest."""
    if pooling.truncate_tokens is None:
        return None
    if pooling.truncate_tokens > limit:
        text = f"'truncate_prompt_tokens' is at most the model's context of {limit} tokens."
        raise InvalidRequest(text, "truncate_prompt_tokens", "invalid_value")
    return limit if pooling.truncate_tokens == -1 else pooling.truncate_tokens
