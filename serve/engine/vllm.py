"""vLLM behind the engine seam: AsyncLLM inside a replica.

The only module of the serving side that imports vLLM, and it does so inside functions: the
gateway shares this package and must not load torch.
"""

import asyncio
import contextlib
import logging
import os
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from finetune.errors import FinetuneError
from serve.adapters import AdapterRef
from serve.engine import scratch
from serve.engine.base import (
    Accepted,
    Counters,
    Delta,
    Event,
    Finished,
    GenerationRequest,
    Message,
    Residency,
)
from serve.engine.packer import Packer
from serve.engine.slots import Slots
from serve.errors import (
    BespokeError,
    ContextLengthExceeded,
    EngineFailed,
    EngineLost,
    EngineUnavailable,
    InvalidRequest,
)
from serve.lora_files import target_suffixes
from serve.settings import EngineSettings
from serve.vllm_plugin.packed import Layer, Layout

log = logging.getLogger(__name__)

# AsyncLLM registers its metrics in the process-wide registry under these names.
_PROMPT_COUNTER, _COMPLETION_COUNTER = "vllm:prompt_tokens", "vllm:generation_tokens"
_PROBE = (Message("user", "Hello"),)
_PROBE_LOGPROBS = 20


class VllmEngine:
    """One AsyncLLM, its adapters and its counters. Make it with `start`."""

    def __init__(
        self, llm: Any, base: str, replica: str, packer: Packer | None = None, slots: Slots | None = None
    ) -> None:
        self._llm = llm
        self._base = base
        self._replica = replica
        self._boot = uuid.uuid4().hex
        self._packer = packer
        self._slots = slots
        self._probed = (0, 0)
        self.served = 0  # adapter versions that this base should serve

    @classmethod
    async def start(
        cls, base: str, base_dir: Path, adapters_dir: Path, settings: EngineSettings, replica: str
    ) -> "VllmEngine":
        """Load the base and prove with one real request that it answers. Takes tens of seconds."""
        _prepare_environment(settings)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        targets = target_suffixes(base_dir) if settings.max_loras else []
        args = AsyncEngineArgs(model=str(base_dir), served_model_name=base, **_engine_args(settings, targets))
        llm = AsyncLLM.from_engine_args(args)
        if not settings.max_loras:
            engine = cls(llm, base, replica)
        else:
            packer = Packer(
                await _layout(llm) if settings.device == "cpu" else None,
                adapters_dir,
                scratch.make(),
                capacity=settings.max_cpu_loras,
                preload=_preload(llm),
            )
            engine = cls(llm, base, replica, packer, Slots(settings.max_loras, settings.slot_patience_s))
        await engine.logprobs(None)
        return engine

    @property
    def context_tokens_max(self) -> int:
        return int(self._llm.model_config.max_model_len)

    @property
    def resident(self) -> list[int]:
        """Ids of the adapters in this replica's memory."""
        return self._packer.held if self._packer else []

    async def logprobs(self, adapter: AdapterRef | None) -> dict[int, float]:
        """Log-probabilities of the likeliest first tokens of an answer: what `probe` compares.

        Billed to nobody, cached for nobody. Raises EngineUnavailable, EngineLost.
        """
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        prompt_ids = await asyncio.to_thread(self._tokenize, _PROBE)
        number = f"probe-{uuid.uuid4().hex}"
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": number}
        params = SamplingParams(
            temperature=0.0, max_tokens=1, logprobs=_PROBE_LOGPROBS, output_kind=RequestOutputKind.FINAL_ONLY
        )
        self._probed = (self._probed[0] + len(prompt_ids), self._probed[1] + 1)
        try:
            async with self._lora(adapter) as lora:
                async for output in self._llm.generate(prompt, params, number, lora_request=lora):
                    (first,) = output.outputs[0].logprobs
                    return {int(token): float(entry.logprob) for token, entry in first.items()}
        except (BespokeError, FinetuneError, OSError):
            raise
        except Exception as error:
            log.exception("the probe failed")
            raise _lost_or(EngineUnavailable(), self._llm) from error
        raise EngineUnavailable()

    async def keep(self, wanted: frozenset[int], pinned: list[AdapterRef]) -> None:
        """Hold `pinned` in memory from now on; drop what is neither `wanted` nor in use."""
        if self._packer is None:
            return
        self.served = len(wanted)
        self._packer.pinned = frozenset(ref.id for ref in pinned)
        for ref in pinned:
            try:
                async with self._packer.hold(ref):
                    pass
            except (FinetuneError, OSError):
                log.exception("%s is pinned and cannot be loaded", ref.model)
        for adapter in self._packer.held:
            if adapter not in wanted:
                await self.unload(adapter)

    async def unload(self, adapter: int) -> None:
        """Out of the slots and out of memory, unless a request still holds it."""
        if self._packer is not None and self._packer.drop(adapter):
            await self._llm.remove_lora(adapter)

    @contextlib.asynccontextmanager
    async def _lora(self, adapter: AdapterRef | None) -> AsyncIterator[Any]:
        """The adapter's LoRARequest, packed in memory and sure of a slot; None for the base."""
        if adapter is None:
            yield None
            return
        if self._packer is None or self._slots is None:
            raise EngineUnavailable("This base is served without adapters.")
        from vllm.lora.request import LoRARequest

        async with self._packer.hold(adapter) as path, self._slots.hold(adapter.id):
            yield LoRARequest(adapter.model, adapter.id, str(path))

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """See `serve.engine.base.Engine.stream`."""
        prompt_ids = await asyncio.to_thread(self._tokenize, request.prompt)
        params = self._params(request, len(prompt_ids))
        async with contextlib.AsyncExitStack() as held:
            try:
                lora = await held.enter_async_context(self._lora(request.adapter))
                prompt = {"prompt_token_ids": prompt_ids, "cache_salt": request.cache_salt}
                outputs = await self._llm.add_request(request.request_id, prompt, params, lora_request=lora)
            except BespokeError:
                raise
            except ValueError as error:  # vLLM's own validation, should ours have let something pass
                raise InvalidRequest(str(error)) from error
            except Exception as error:
                log.exception("request %s was not accepted", request.request_id)
                raise _lost_or(EngineUnavailable(), self._llm) from error
            tally = _Tally(len(prompt_ids))
            try:
                yield [Accepted(self._replica, self._boot, len(prompt_ids))]
                while not tally.finished:
                    # `get_nowait` first: under load the queue is seldom empty and a task switch is saved.
                    batch = tally.read(outputs.get_nowait() or await outputs.get())
                    if batch:
                        yield batch
            except Exception as error:
                # Nothing of vLLM's own may travel to the gateway: unpickling it there would load torch.
                log.exception("request %s failed in vLLM", request.request_id)
                raise _lost_or(EngineFailed(), self._llm) from error
            finally:
                if not tally.finished:
                    await self._llm.abort(outputs.request_id, internal=True)
                outputs.close()

    def _params(self, request: GenerationRequest, prompt_tokens: int) -> Any:
        """vLLM's SamplingParams. Raises ContextLengthExceeded, InvalidRequest."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        sampling = request.sampling
        room = self.context_tokens_max - prompt_tokens
        wanted = sampling.completion_tokens_max
        if room < (wanted or 1):
            param = request.length_param if wanted and room > 0 else "messages"
            raise ContextLengthExceeded(self.context_tokens_max, prompt_tokens, wanted or 1, param)
        try:
            return SamplingParams(
                n=sampling.n,
                # vLLM refuses several greedy samples; its lowest temperature is as good as greedy.
                temperature=max(sampling.temperature, 0.01) if sampling.n > 1 else sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop=list(sampling.stop),
                presence_penalty=sampling.presence_penalty,
                frequency_penalty=sampling.frequency_penalty,
                max_tokens=wanted or room,
                output_kind=RequestOutputKind.DELTA,
            )
        except ValueError as error:
            raise InvalidRequest(str(error)) from error

    async def abort(self, request_id: str) -> None:
        await self._llm.abort(request_id)

    async def counters(self) -> Counters:
        """vLLM's own counters, read from its Prometheus registry."""
        from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

        totals = {_PROMPT_COUNTER: 0, _COMPLETION_COUNTER: 0}
        running = 0
        for metric in get_metrics_snapshot():
            if isinstance(metric, Counter) and metric.name in totals:
                totals[metric.name] += int(metric.value)
            elif isinstance(metric, Gauge) and metric.name == "vllm:num_requests_running":
                running += int(metric.value)
        return Counters(
            self._base,
            self._replica,
            self._boot,
            totals[_PROMPT_COUNTER],
            totals[_COMPLETION_COUNTER],
            *self._probed,
            running,
            await self._residency(),
        )

    async def _residency(self) -> Residency:
        if self._packer is None or self._slots is None:
            return Residency()
        try:
            (worker, *_) = await self._llm.collective_rpc("bespoke_residency")
        except Exception as error:
            log.exception("vLLM does not tell what it holds")
            raise _lost_or(EngineUnavailable(), self._llm) from error
        return Residency(
            slots=len(worker["slots"]),
            memory=len(self._packer.held),
            disk=self.served,
            memory_loads=self._packer.loads,
            memory_load_s=self._packer.load_s,
            memory_evictions=self._packer.evictions,
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
        self._llm.shutdown()
        if self._packer is not None:
            self._packer.close()

    def _tokenize(self, prompt: tuple[Message, ...] | str) -> list[int]:
        tokenizer = self._llm.get_tokenizer()
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            messages = [{"role": message.role, "content": message.content} for message in prompt]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        if not ids:
            raise InvalidRequest("The prompt is empty.", "prompt", "invalid_value")
        return list(ids)


def _lost_or(error: BespokeError, llm: Any) -> BespokeError:
    """EngineLost if vLLM's core process has died, so that the gateway tries another replica; else `error`."""
    return EngineLost() if llm.errored else error


async def _layout(llm: Any) -> Layout | None:
    (found, *_) = await llm.collective_rpc("bespoke_layout")
    if found is None:
        log.warning("adapters of this model are loaded by vLLM's own loader, within its steps")
        return None
    layers = (Layer(tuple(parts), width, tuple(outs)) for parts, width, outs in found["layers"])
    return Layout(tuple(layers), found["dtype"])


def _preload(llm: Any) -> Callable[[AdapterRef, Path], Awaitable[None]]:
    """vLLM's own loading, before the first request: an error there is an answer, in a step it is the end."""
    from vllm.lora.request import LoRARequest

    async def preload(ref: AdapterRef, path: Path) -> None:
        try:
            await llm.add_lora(LoRARequest(ref.model, ref.id, str(path)))
        except Exception as error:
            log.exception("%s cannot be loaded", ref.model)
            refusal = EngineUnavailable(f"The adapter of '{ref.model}' could not be loaded.")
            raise _lost_or(refusal, llm) from error

    return preload


class _Tally:
    """Turns vLLM's outputs of one request into events and counts as it goes."""

    def __init__(self, prompt_tokens: int) -> None:
        self.finished = False
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._completion_tokens = 0
        self._aborted = False

    def read(self, output: Any) -> list[Event]:
        """The events in one RequestOutput (of kind DELTA); its last one ends with Finished."""
        batch: list[Event] = []
        self._cached_tokens = max(self._cached_tokens, output.num_cached_tokens or 0)
        for choice in output.outputs:
            count = len(choice.token_ids)
            self._completion_tokens += count
            aborted = choice.finish_reason == "abort"
            self._aborted = self._aborted or aborted
            if choice.text or count or (choice.finish_reason and not aborted):
                reason = None if aborted else choice.finish_reason
                batch.append(Delta(choice.index, choice.text, count, reason))
        if output.finished:
            self.finished = True
            cached = min(self._cached_tokens, self._prompt_tokens)
            batch.append(Finished(self._prompt_tokens, cached, self._completion_tokens, self._aborted))
        return batch


def compute_on_one_thread() -> None:
    """For a replica's process: to pack an adapter takes 34 ms so, and 48 on all threads.

    vLLM computes in processes of its own. The tensors are small, and other threads would wait actively
    on the cores of vLLM's worker.
    """
    import torch

    torch.set_num_threads(1)


def _prepare_environment(settings: EngineSettings) -> None:
    """vLLM reads these at import and in the processes it starts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # its internal sockets stay on this machine
    if settings.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))


def _engine_args(settings: EngineSettings, lora_targets: list[str]) -> dict[str, Any]:
    args: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    if lora_targets:
        args |= {
            "enable_lora": True,
            "max_loras": settings.max_loras,
            "max_cpu_loras": max(settings.max_cpu_loras, settings.max_loras),
            "max_lora_rank": settings.max_lora_rank,
            # Otherwise the output layer is wrapped too, and its zero delta computed in every step.
            "lora_target_modules": lora_targets,
            "worker_extension_cls": "serve.vllm_plugin.worker.WorkerExtension",
        }
    if settings.device == "gpu":
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return args
