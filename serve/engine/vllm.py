"""vLLM behind the engine seam: AsyncLLM inside a replica.

The only module of the serving side that imports vLLM, and it does so inside functions: the
gateway shares this package and must not load torch.
"""

import asyncio
import logging
import os
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from serve.adapters import AdapterRef
from serve.engine.base import Accepted, Counters, Delta, Event, Finished, GenerationRequest, Message, Sampling
from serve.errors import BespokeError, ContextLengthExceeded, EngineFailed, EngineUnavailable, InvalidRequest
from serve.settings import EngineSettings

log = logging.getLogger(__name__)

# AsyncLLM registers its metrics in the process-wide registry under these names.
_PROMPT_COUNTER, _COMPLETION_COUNTER = "vllm:prompt_tokens", "vllm:generation_tokens"


class VllmEngine:
    """One AsyncLLM, its adapters and its counters. Make it with `start`."""

    def __init__(self, llm: Any, base: str, adapters_dir: Path, replica: str) -> None:
        self._llm = llm
        self._base = base
        self._adapters_dir = adapters_dir
        self._replica = replica
        self._boot = uuid.uuid4().hex
        self._loads: dict[int, asyncio.Task[None]] = {}
        self._loaded: dict[int, str] = {}
        self._probe = (0, 0)

    @classmethod
    async def start(
        cls, base: str, base_dir: Path, adapters_dir: Path, settings: EngineSettings, replica: str
    ) -> "VllmEngine":
        """Load the base and prove with one real request that it answers. Takes tens of seconds."""
        _prepare_environment(settings)
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(model=str(base_dir), served_model_name=base, **_engine_args(settings))
        engine = cls(AsyncLLM.from_engine_args(args), base, adapters_dir, replica)
        await engine._prove()
        return engine

    @property
    def context_tokens_max(self) -> int:
        return int(self._llm.model_config.max_model_len)

    async def _prove(self) -> None:
        hello = (Message("user", "Hello"),)
        request = GenerationRequest(
            f"probe-{self._boot}", None, hello, Sampling(completion_tokens_max=4, temperature=0.0), "probe"
        )
        async for _ in self.stream(request):
            pass
        counters = await self.counters()
        self._probe = (counters.prompt_tokens, counters.completion_tokens)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[list[Event]]:
        """See `serve.engine.base.Engine.stream`."""
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        prompt_ids = await asyncio.to_thread(self._tokenize, request.prompt)
        room = self.context_tokens_max - len(prompt_ids)
        wanted = request.sampling.completion_tokens_max
        if room < (wanted or 1):
            param = request.length_param if wanted and room > 0 else "messages"
            raise ContextLengthExceeded(self.context_tokens_max, len(prompt_ids), wanted or 1, param)
        sampling = request.sampling
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": request.cache_salt}
        try:
            params = SamplingParams(
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
            lora = await self._ensure_loaded(request.adapter)
            outputs = await self._llm.add_request(request.request_id, prompt, params, lora_request=lora)
        except BespokeError:
            raise
        except ValueError as error:  # vLLM's own validation, should ours have let something pass
            raise InvalidRequest(str(error)) from error
        except Exception as error:
            log.exception("request %s was not accepted", request.request_id)
            raise EngineUnavailable() from error
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
            raise EngineFailed() from error
        finally:
            if not tally.finished:
                await self._llm.abort(outputs.request_id, internal=True)
            outputs.close()

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
            *self._probe,
            running,
            tuple(sorted(self._loaded.values())),
        )

    async def check_health(self) -> None:
        """Raises EngineUnavailable once vLLM's core process has died."""
        try:
            await self._llm.check_health()
        except Exception as error:
            raise EngineUnavailable() from error

    def shutdown(self) -> None:
        self._llm.shutdown()

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

    async def _ensure_loaded(self, adapter: AdapterRef | None) -> Any:
        """The adapter's LoRARequest, loaded: once, however many requests ask for it at a time."""
        if adapter is None:
            return None
        from vllm.lora.request import LoRARequest

        path = adapter.path(self._adapters_dir)
        lora = LoRARequest(adapter.model, adapter.id, str(path))
        task = self._loads.get(adapter.id)
        if task is None or (task.done() and (task.cancelled() or task.exception())):
            task = self._loads[adapter.id] = asyncio.create_task(self._load(adapter, lora))
        await asyncio.shield(task)  # one client's disconnect must not undo another's load
        return lora

    async def _load(self, adapter: AdapterRef, lora: Any) -> None:
        try:
            await self._llm.add_lora(lora)
        except Exception as error:
            raise EngineUnavailable(f"The adapter of '{adapter.model}' could not be loaded.") from error
        self._loaded[adapter.id] = adapter.model


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


def _prepare_environment(settings: EngineSettings) -> None:
    """vLLM reads these at import and in the processes it starts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # its internal sockets stay on this machine
    if settings.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))


def _engine_args(settings: EngineSettings) -> dict[str, Any]:
    args: dict[str, Any] = {
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "enable_lora": True,
        "max_loras": settings.max_loras,
        "max_cpu_loras": settings.max_cpu_loras,
        "max_lora_rank": settings.max_lora_rank,
        "enforce_eager": settings.enforce_eager,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
    }
    if settings.device == "gpu":
        args["gpu_memory_utilization"] = settings.gpu_memory_utilization
    return args
