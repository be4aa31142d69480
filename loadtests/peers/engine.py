"""Gives our engine's arguments to the peers that run vLLM, so that only what is around the engine differs."""

import os
from pathlib import Path
from typing import Any

from serve.engine.vllm.upstream import CPU_EXECUTOR
from serve.settings import EngineSettings, load_settings

ROOT = Path(__file__).parents[2]


def base_dir(home: Path, base: str) -> Path:
    return (home / "bases" / base).resolve()


def settings() -> EngineSettings:
    return load_settings(ROOT / "configs" / "serve" / "cpu.yaml").engine_here


def engine_arguments(engine: EngineSettings, lora_targets: list[str]) -> dict[str, Any]:
    """Returns the arguments that our engine gives vLLM, without the worker extension of our adapter slots."""
    return {
        "dtype": engine.dtype,
        "max_model_len": engine.max_model_len,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
        "enforce_eager": engine.enforce_eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enable_prefix_caching": True,
        "disable_log_stats": False,
        "enable_lora": True,
        "max_loras": engine.max_loras,
        "max_cpu_loras": max(engine.max_cpu_loras, engine.max_loras),
        "max_lora_rank": engine.max_lora_rank,
        "lora_target_modules": lora_targets,
        "distributed_executor_backend": CPU_EXECUTOR,
    }


def engine_variables(engine: EngineSettings) -> dict[str, str]:
    """Returns the environment of a process that starts vLLM."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(engine.compute_threads),
        "VLLM_CPU_KVCACHE_SPACE": str(engine.kv_cache_gib),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
