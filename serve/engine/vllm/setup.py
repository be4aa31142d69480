"""Sets up vLLM in a replica's process: its variables, its arguments, its threads."""

import os
from typing import Any

from serve.engine.vllm.grammars import CORE_CACHE_MB
from serve.engine.vllm.upstream import CPU_EXECUTOR
from serve.settings import EngineSettings


def prepare_environment(settings: EngineSettings) -> None:
    """Sets the variables that vLLM reads at import and in the processes it starts."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_XGRAMMAR_CACHE_MB", str(CORE_CACHE_MB))
    os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")  # its internal sockets stay on this machine
    if settings.device == "cpu":
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(settings.kv_cache_gib))
        # Not `setdefault`: Ray's workers have a 1 there.
        os.environ["OMP_NUM_THREADS"] = str(settings.compute_threads or 1)


def engine_args(settings: EngineSettings, lora_targets: list[str]) -> dict[str, Any]:
    """Returns vLLM's arguments for a replica. Without `lora_targets` it serves no adapters."""
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
    elif settings.tensor_parallel_size == 1:
        args["distributed_executor_backend"] = CPU_EXECUTOR
    return args


def pooling_args(settings: EngineSettings, context_tokens: int) -> dict[str, Any]:
    """Returns vLLM's arguments for a replica of a base that makes embeddings of `context_tokens` at most."""
    args = engine_args(settings, [])
    context = min(settings.max_model_len, context_tokens)
    return args | {
        "runner": "pooling",
        "max_model_len": context,
        # Every token looks at all others, so a text is computed in one step.
        "max_num_batched_tokens": max(settings.max_num_batched_tokens, context),
        "enable_prefix_caching": False,
        # Compiled, MiniLM is no faster on CPUs (docs/performance.md), and starts half a minute later.
        "enforce_eager": settings.enforce_eager or settings.device == "cpu",
    }


def compute_on_one_thread() -> None:
    """Limits PyTorch to one thread in a replica's process: packing an adapter takes 34 ms, 48 on all threads.

    vLLM computes in a process of its own. The tensors here are small, and other threads would wait actively
    on vLLM's cores.
    """
    import torch

    torch.set_num_threads(1)
