"""Publishes adapters with random weights for benchmarks and tests: real files and cards, no training."""

import json
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from finetune.card import (
    ADAPTER_CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterCard,
    Data,
    Gate,
    Libraries,
    Metrics,
    content_version,
)
from finetune.hashing import file_sha256, json_sha256
from finetune.publish import publish
from serve.registry.validation import decoder_linears

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ATTENTION = ALL[:4]


def publish_random(
    base_dir: Path,
    adapters_dir: Path,
    *,
    tenant: str,
    name: str,
    seed: int,
    rank: int = 8,
    targets: tuple[str, ...] = ALL,
    layers: int | None = None,
    size: float = 0.01,
) -> Path:
    """Publishes a LoRA adapter for the base in `base_dir` and returns its directory.

    `layers` adapts only so many of the last layers. A is normal with variance 1 / in, B normal with
    deviation `size`: with 0.01 a 135M model still writes words, but other ones than the base.
    """
    random = np.random.default_rng(seed)
    tensors = {}
    linears = decoder_linears(base_dir)
    depth = 1 + max(_layer(module) for module in linears)
    for module, (rows, columns) in linears.items():
        if module.rpartition(".")[2] in targets and _layer(module) >= depth - (layers or depth):
            a = random.standard_normal((rank, columns), dtype=np.float32) / np.float32(np.sqrt(columns))
            b = random.standard_normal((rows, rank), dtype=np.float32) * np.float32(size)
            tensors[f"base_model.model.{module}.lora_A.weight"] = a
            tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "bias": "none",
        "target_modules": sorted(targets),
    }
    with tempfile.TemporaryDirectory() as staging:
        directory = Path(staging)
        save_file(tensors, directory / WEIGHTS_NAME)
        (directory / ADAPTER_CONFIG_NAME).write_text(json.dumps(config))
        return publish(
            directory, adapters_dir, _card(directory, base_dir.name, tenant, name, seed, rank, targets)
        )


def _layer(module: str) -> int:
    return int(module.partition("layers.")[2].partition(".")[0])


def _card(
    directory: Path, base: str, tenant: str, name: str, seed: int, rank: int, targets: tuple[str, ...]
) -> AdapterCard:
    nothing = json_sha256("random weights")
    return AdapterCard(
        tenant=tenant,
        adapter=name,
        version=content_version(directory),
        base=base,
        base_sha256=nothing,
        rank=rank,
        target_modules=targets,
        data=Data(source_sha256=nothing, train_rows=1, heldout_rows=1, dropped={}),
        config={},
        config_sha256=json_sha256({}),
        weights_sha256=file_sha256(directory / WEIGHTS_NAME),
        adapter_config_sha256=file_sha256(directory / ADAPTER_CONFIG_NAME),
        seed=seed,
        libraries=Libraries(**{name: version(name) for name in ("torch", "transformers", "peft")}),
        metrics=Metrics(
            heldout_rows=1,
            heldout_answer_tokens=1,
            base_nll=0,
            adapter_nll=0,
            difference=0,
            difference_ci95=(0, 0),
            base_perplexity=1,
            adapter_perplexity=1,
            bootstrap_resamples=1,
            bootstrap_seed=0,
        ),
        gate=Gate(rule="none", passed=True, reason="random weights, for benchmarks and tests only"),
        created_at=datetime.now(UTC),
    )
