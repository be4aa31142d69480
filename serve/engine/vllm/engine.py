"""Runs one base in vLLM: AsyncLLM inside a replica, behind the Engine protocol.

vLLM is imported inside functions, here and in the modules beside it: the gateway shares this package and
must not load torch.
"""

import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from quantize.card import read_card
from serve.billing.metering.terms import RequestUsage
from serve.billing.pricing.plans import Tokens
from serve.engine.adapters import cache
from serve.engine.adapters.cache import AdapterCache
from serve.engine.adapters.slots import Slots
from serve.engine.protocol import (
    Accepted,
    Counters,
    Finished,
    GenerationRequest,
    JsonFormat,
    Message,
    Residency,
    Sampling,
    Take,
    Texts,
)
from serve.engine.vllm import upstream
from serve.engine.vllm.counters import read_counters
from serve.engine.vllm.grammar_gate import GrammarGate
from serve.engine.vllm.grammar_process import GrammarProcess
from serve.engine.vllm.grammars import GRAMMAR_BACKEND, check_grammar, make_gate
from serve.engine.vllm.outputs import OutputHook, OutputParser
from serve.engine.vllm.prompts import PromptRenderer, Rendered, refusal_of
from serve.engine.vllm.setup import engine_args, prepare_environment
from serve.engine.vllm.usage_log import UsageLog
from serve.errors import BespokeError, EngineFailed, EngineLost, EngineUnavailable
from serve.observability import logs
from serve.observability.tracing import prepare_vllm, trace_id_of, traces_url
from serve.registry.validation import target_suffixes
from serve.registry.versions import AdapterVersion
from serve.settings import EngineSettings
from serve.vllm_plugin.packed import Layer, Layout

log = logging.getLogger(__name__)

_PROBE = (Message("user", "Hello"),)
_PROBE_LOGPROBS = 20


class VllmEngine:
    """Owns one AsyncLLM, its adapters and its counters. Make it with `start`."""

    def __init__(
        self,
        llm: Any,
        renderer: PromptRenderer,
        grammar_gate: GrammarGate,
        base: str,
        replica: str,
        adapter_cache: AdapterCache | None = None,
        slots: Slots | None = None,
    ) -> None:
        self._llm = llm
        self._renderer = renderer
        self._grammar_gate = grammar_gate
        self._base = base
        self._replica = replica
        self._boot = uuid.uuid4().hex
        self._cache = adapter_cache
        self._slots = slots
        self._probe_tokens = (0, 0)
        self._queues: dict[str, list[Any]] = {}  # request id → vLLM's queue for each of its prompts
        self._usage_log = UsageLog(self.abort)
        self._unloads = 0
        self._worker: dict[str, Any] = {}
        self._residency_key: tuple[int, ...] = ()
        self.desired_count = 0  # adapter versions that this base should serve

    @classmethod
    async def start(
        cls,
        base: str,
        base_dir: Path,
        adapters_dir: Path,
        settings: EngineSettings,
        replica: str,
        otlp_endpoint: str | None = None,
    ) -> "VllmEngine":
        """Loads the base and proves with one real request that it answers. Takes tens of seconds."""
        prepare_environment(settings)
        prepare_vllm(otlp_endpoint)
        targets = target_suffixes(base_dir) if settings.max_loras else []
        grammar_process = GrammarProcess()
        grammar_process.start()  # loads while the model does
        llm = upstream.start_llm(
            model=str(base_dir),
            served_model_name=base,
            structured_outputs_config=upstream.grammar_config(GRAMMAR_BACKEND),
            otlp_traces_endpoint=traces_url(otlp_endpoint) if otlp_endpoint else None,
            **engine_args(settings, targets),
        )
        upstream.validate_grammars_without_compiling()
        card, gate = read_card(base_dir), make_gate(grammar_process, llm)
        renderer = PromptRenderer(llm, tool_parser=card.tool_parser, reasoning_parser=card.reasoning_parser)
        if not settings.max_loras:
            engine = cls(llm, renderer, gate, base, replica)
        else:
            adapter_cache = AdapterCache(
                await _layout(llm) if settings.device == "cpu" else None,
                adapters_dir,
                cache.make_directory(),
                capacity=settings.max_cpu_loras,
                preload=_preload(llm),
            )
            engine = cls(
                llm,
                renderer,
                gate,
                base,
                replica,
                adapter_cache,
                Slots(settings.max_loras, settings.slot_patience_s),
            )
        await engine.logprobs(None, JsonFormat())  # the first grammar loads the grammar library
        return engine

    @property
    def context_tokens_max(self) -> int:
        return self._renderer.context_tokens_max

    @property
    def loaded_adapters(self) -> list[int]:
        """Ids of the adapters in this replica's memory."""
        return self._cache.cached_ids if self._cache else []

    async def logprobs(
        self, adapter: AdapterVersion | None, format: JsonFormat | None = None
    ) -> dict[int, float]:
        """Returns log-probabilities of the likeliest first tokens of an answer, which `probe` compares.

        The request is billed to nobody and cached for nobody. Raises EngineUnavailable, EngineLost.
        """
        number = f"probe-{uuid.uuid4().hex}"
        sampling = Sampling(completion_tokens_max=1, temperature=0.0, logprobs=_PROBE_LOGPROBS, format=format)
        probe = GenerationRequest(number, adapter, _PROBE, sampling, cache_salt=number)
        rendered = await self._renderer.render(probe)
        await check_grammar(self._grammar_gate, probe, rendered.params)
        ((prompt,), (params,)) = rendered.inputs, rendered.params
        try:
            async with self._lora(adapter) as lora:
                self._probe_tokens = (
                    self._probe_tokens[0] + rendered.prompt_tokens,
                    self._probe_tokens[1] + 1,
                )
                async for output in self._llm.generate(prompt, params, number, lora_request=lora):
                    (first,) = output.outputs[0].logprobs
                    return {int(token): float(entry.logprob) for token, entry in first.items()}
        except (BespokeError, FinetuneError, OSError):
            raise
        except Exception as error:
            log.exception("the probe failed")
            raise _lost_or(EngineUnavailable(), self._llm) from error
        raise EngineUnavailable()

    async def apply_desired(self, wanted: frozenset[int], pinned: list[AdapterVersion]) -> None:
        """Holds `pinned` in memory from now on, and drops what is neither `wanted` nor in use."""
        if self._cache is None:
            return
        self.desired_count = len(wanted)
        self._cache.pinned = frozenset(ref.id for ref in pinned)
        for ref in pinned:
            try:
                async with self._cache.hold(ref):
                    pass
            except (FinetuneError, OSError):
                log.exception("%s is pinned and cannot be loaded", ref.model)
        # Memory evicts an adapter without its slot, so a slot's may be in memory no more.
        worker = await self._ask_worker(read_counters()[:3])
        for adapter in sorted({*self._cache.cached_ids, *worker["slots"]}):
            if adapter not in wanted:
                await self.unload(adapter)

    async def unload(self, adapter: int) -> None:
        """Removes an adapter from the slots and from memory, unless a request still holds it."""
        if self._cache is not None and self._cache.drop(adapter):
            await self._llm.remove_lora(adapter)
            self._unloads += 1

    @contextlib.asynccontextmanager
    async def _lora(self, adapter: AdapterVersion | None) -> AsyncIterator[Any]:
        """Gives the adapter's LoRARequest, once it is packed in memory and has a slot; None for the base."""
        if adapter is None:
            yield None
            return
        if self._cache is None or self._slots is None:
            raise EngineUnavailable("This base is served without adapters.")
        from vllm.lora.request import LoRARequest

        async with self._cache.hold(adapter) as path, self._slots.hold(adapter.id):
            yield LoRARequest(adapter.model, adapter.id, str(path))

    async def generate(self, request: GenerationRequest, take: Take) -> None:
        """See `serve.engine.protocol.Engine.generate`. Cancelled, it ends the request."""
        logs.set_log_context(request.request_id, trace_id=trace_id_of(request.trace_headers))
        if request.count_only:
            tokens = await self._renderer.count(request)
            take([Accepted(self._replica, self._boot, tokens), Finished(tokens, 0, 0, aborted=False)])
            return
        rendered = await self._renderer.render(request)
        await check_grammar(self._grammar_gate, request, rendered.params)
        parser = self._parser(request, rendered)
        adapter = request.adapter
        cold = int(adapter is not None and self._cache is not None and not self._cache.has(adapter.id))
        async with contextlib.AsyncExitStack() as resources:
            try:
                lora = await resources.enter_async_context(self._lora(request.adapter))
                count = partial(self._usage, parser, cold)
                resources.enter_context(self._usage_log.recording(request.request_id, count))
                queues = await resources.enter_async_context(self._added(request, rendered, lora, parser))
            except BespokeError:
                raise
            except Exception as error:
                if refusal := refusal_of(error):  # vLLM's validation: what only it can know
                    raise refusal from error
                log.exception("request %s was not accepted", request.request_id)
                raise _lost_or(EngineUnavailable(), self._llm) from error
            try:
                most = rendered.completion_tokens_max
                take([Accepted(self._replica, self._boot, rendered.prompt_tokens, cold, most)])
                hook = OutputHook(parser, take)
                for part, queue in enumerate(queues):
                    hook.open(part, queue)
                await hook.ended
            except Exception as error:
                # vLLM's own errors do not travel. The gateway must know whether another replica may be tried.
                log.exception("request %s failed in vLLM", request.request_id)
                raise _lost_or(EngineFailed(), self._llm) from error

    def _parser(self, request: GenerationRequest, rendered: Rendered) -> OutputParser:
        tokenizer, sampling = self._renderer.tokenizer, request.sampling
        prompts = [each["prompt_token_ids"] for each in rendered.inputs]
        echo = []
        if sampling.echo and isinstance(request.prompt, Texts):
            given = zip(request.prompt.prompts, prompts, strict=True)
            echo = [text if isinstance(text, str) else tokenizer.decode(ids) for text, ids in given]
        # Clients that score a prompt ask for one token more, and count from the end (lm-eval).
        scores = sampling.echo and sampling.completion_tokens_max == 1
        return OutputParser(
            self._renderer.vocabulary,
            prompts,
            request=rendered.request,
            samples=sampling.n,
            parser=lambda: self._renderer.parser(rendered),
            collect=request.collect,
            logprobs=sampling.logprobs,
            echo=echo,
            skip_special_tokens=rendered.params[0].skip_special_tokens,
            all_tokens=scores,
            prompt_only=sampling.completion_tokens_max == 0,
        )

    @contextlib.asynccontextmanager
    async def _added(
        self, request: GenerationRequest, rendered: Rendered, lora: Any, parser: OutputParser
    ) -> AsyncIterator[list[Any]]:
        """Adds the request to vLLM and gives its queues of outputs, one for each prompt.

        At the end of the block it aborts the request, unless `parser` has seen its end.
        """
        queues = self._queues[request.request_id] = []
        try:
            for part, (prompt, params) in enumerate(zip(rendered.inputs, rendered.params, strict=True)):
                name = _name(request.request_id, part)
                headers = request.trace_headers
                queues.append(
                    await self._llm.add_request(
                        name, prompt, params, lora_request=lora, trace_headers=headers
                    )
                )
            yield queues
        finally:
            del self._queues[request.request_id]
            if not parser.finished:
                await self._abort(queues)
                # What vLLM has counted by now lies in its queues, unless a hook took it; the usage log needs
                # it.
                for part, queue in enumerate(queues):
                    if (output := queue.get_nowait()) is not None:
                        parser.read(part, output)
            for queue in queues:
                queue.close()
            prompt_tokens, completion_tokens = self._probe_tokens
            self._probe_tokens = prompt_tokens, completion_tokens + parser.uncounted_tokens

    def _usage(self, parser: OutputParser, cold_loads: int) -> RequestUsage:
        return RequestUsage(self._replica, self._boot, Tokens(*parser.counts), cold_loads=cold_loads)

    async def final_usage(self, request_id: str) -> RequestUsage | None:
        """Returns this replica's final usage of the request, None if it has done nothing for it.

        See `serve.engine.protocol.Engine.final_usage`.
        """
        return await self._usage_log.final_usage(request_id)

    async def abort(self, request_id: str) -> None:
        await self._abort(self._queues.get(request_id, ()))

    async def _abort(self, queues: Iterable[Any]) -> None:
        await upstream.abort(self._llm, queues)

    async def counters(self) -> Counters:
        """Returns vLLM's own counters, read from its Prometheus registry."""
        prompt_tokens, completion_tokens, running, load = read_counters()
        return Counters(
            self._base,
            self._replica,
            self._boot,
            prompt_tokens,
            completion_tokens,
            *self._probe_tokens,
            running,
            await self._residency((prompt_tokens, completion_tokens, running)),
            load,
            self._grammar_gate.counts,
        )

    async def _ask_worker(self, counts: tuple[int, ...]) -> dict[str, Any]:
        """Returns the worker's residency. It asks only if `counts` show that slots can have changed.

        The worker answers between two steps. Workers in processes of their own wait actively for a second
        after each call: a fifth of a core, if a steward asks every five seconds.
        """
        if self._cache is not None:
            counts += (self._cache.loads, self._cache.evictions, self._unloads)
        if counts != self._residency_key:
            try:
                (self._worker, *_) = await self._llm.collective_rpc("bespoke_residency")
            except Exception as error:
                log.exception("vLLM does not answer which adapters it holds")
                raise _lost_or(EngineUnavailable(), self._llm) from error
            self._residency_key = counts
        return self._worker

    async def _residency(self, counts: tuple[int, ...]) -> Residency:
        """Counts adapters by tier."""
        if self._cache is None or self._slots is None:
            return Residency()
        worker = await self._ask_worker(counts)
        return Residency(
            slots=len(worker["slots"]),
            memory=len(self._cache.cached_ids),
            disk=self.desired_count,
            memory_loads=self._cache.loads,
            memory_load_s=self._cache.load_s,
            memory_evictions=self._cache.evictions,
            slot_loads=worker["activations"],
            slot_load_s=worker["seconds"],
            slot_evictions=worker["evictions"],
            waiting=self._slots.waiting,
            wait_s_max=self._slots.wait_s_max,
        )

    async def check_health(self) -> None:
        """Raises EngineLost once vLLM's core process has died."""
        if self._llm.errored:
            raise EngineLost()

    def shutdown(self) -> None:
        self._grammar_gate.close()
        self._llm.shutdown()
        if self._cache is not None:
            self._cache.close()


def _lost_or(error: BespokeError, llm: Any) -> BespokeError:
    """Returns EngineLost if vLLM's core process has died, so that another replica is tried; else `error`."""
    return EngineLost() if llm.errored else error


async def _layout(llm: Any) -> Layout | None:
    (layout, *_) = await llm.collective_rpc("bespoke_layout")
    if layout is None:
        log.warning("adapters of this model are loaded by vLLM's own loader, within its steps")
        return None
    layers = (Layer(tuple(parts), width, tuple(outs)) for parts, width, outs in layout["layers"])
    return Layout(tuple(layers), layout["dtype"])


def _preload(llm: Any) -> Callable[[AdapterVersion, Path], Awaitable[None]]:
    """Returns a function that loads an adapter in vLLM before its first request.

    An error there refuses the request. Within a step of the engine it would end the engine.
    """
    from vllm.lora.request import LoRARequest

    async def preload(ref: AdapterVersion, path: Path) -> None:
        try:
            await llm.add_lora(LoRARequest(ref.model, ref.id, str(path)))
        except Exception as error:
            log.exception("%s cannot be loaded", ref.model)
            refusal = EngineUnavailable(f"The adapter of '{ref.model}' could not be loaded.")
            raise _lost_or(refusal, llm) from error

    return preload


def _name(request_id: str, part: int) -> str:
    """Names the request for one of several prompts in vLLM."""
    return f"{request_id}.{part}" if part else request_id
