"""The training loop of a LoRA adapter: float32 on the CPU, the same bytes for the same seed and data."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from finetune.base_model import load_model, load_tokenizer
from finetune.card import ADAPTER_CONFIG_NAME, WEIGHTS_NAME
from finetune.errors import BaseUnusable, TooFewRows, TrainingDiverged
from finetune.packing import answer_logits, bounded_groups, pack
from finetune.recipe import Recipe
from finetune.tokens import load_examples
from finetune.train.activation_cache import (
    CACHE_BYTES_MAX,
    activation_bytes,
    compute_activations,
    layers_only,
)
from finetune.train.schedule import batches, learning_rate

OnStep = Callable[[int, int, float, float], None]
"""Receives the step (from 1), the number of steps, the loss, and the tokens per second so far.

A token that several packed rows share counts once for each of them.
"""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """Counts and speed of a finished training run.

    `rows_too_long` is the number of rows left out for exceeding the recipe's max_length_tokens. `tokens` is
    the number of tokens that all steps read together.
    """

    rows: int
    rows_too_long: int
    steps: int
    final_loss: float
    tokens_per_s: float
    tokens: int


def train(
    base_dir: Path,
    train_file: Path,
    out: Path,
    *,
    base: str,
    recipe: Recipe,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Trains on a prepared file and writes adapter_config.json and adapter_model.safetensors into `out`.

    The loss of a step is the mean cross-entropy of its answer tokens, prompts excluded.

    Raises:
        BaseUnusable: the base does not load, or lacks the recipe's modules.
        TooFewRows: no row is short enough.
        TrainingDiverged: a loss or a trained weight is not a finite number.
    """
    tokenizer = load_tokenizer(base_dir)
    examples, too_long = load_examples(tokenizer, train_file, max_length_tokens=recipe.max_length_tokens)
    if not examples:
        raise TooFewRows(train_file, "training", 0, 1, {"too_many_tokens": too_long})
    model = load_model(base_dir)
    frozen = _frozen_layers(model, recipe)
    # Activations too large for memory are not cached: the frozen layers then run again at every step.
    cached = frozen if activation_bytes(model, examples) <= CACHE_BYTES_MAX else 0
    activations = compute_activations(model, examples, layers=cached) if cached else []

    torch.manual_seed(recipe.seed)
    adapter = get_peft_model(model, _lora(model, recipe, frozen, base_dir)).train()
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=recipe.weight_decay)
    steps = list(batches(len(examples), recipe))
    tokens, loss_value, started = 0, math.nan, time.perf_counter()
    with _deterministic(), layers_only(model, cached, None):
        for step, batch in enumerate(steps, start=1):
            for parameters in optimizer.param_groups:
                parameters["lr"] = learning_rate(step, len(steps), recipe)
            answer_tokens = sum(examples[row].answer_tokens for row in batch)
            loss_value = 0.0
            for group in bounded_groups(batch, examples):
                packed = pack([examples[row] for row in group])
                hidden = packed.gather([activations[row] for row in group]) if cached else None
                logits = answer_logits(model, packed, hidden)
                loss = cross_entropy(logits, packed.target, reduction="sum") / answer_tokens
                loss.backward()
                loss_value += loss.item()
            if not math.isfinite(loss_value):
                raise TrainingDiverged(step, loss_value)
            torch.nn.utils.clip_grad_norm_(weights, recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(examples[row].ids) for row in batch)
            if on_step:
                on_step(step, len(steps), loss_value, tokens / (time.perf_counter() - started))
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise TrainingDiverged(len(steps), loss_value)
    _save(adapter, out, base)
    rate = tokens / (time.perf_counter() - started)
    return TrainingResult(len(examples), too_long, len(steps), loss_value, rate, tokens)


def _frozen_layers(model: Any, recipe: Recipe) -> int:
    """Returns the number of layers, counted from the input, that carry no LoRA."""
    layers = int(model.config.num_hidden_layers)
    return max(0, layers - recipe.top_layers) if recipe.top_layers else 0


def _lora(model: Any, recipe: Recipe, frozen: int, base_dir: Path) -> LoraConfig:
    # peft ignores a name that matches no module as long as another one matches.
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := sorted(set(recipe.target_modules) - present):
        raise BaseUnusable(base_dir, f"it has no modules called {', '.join(missing)}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=sorted(recipe.target_modules),
        layers_to_transform=list(range(frozen, model.config.num_hidden_layers)) if frozen else None,
    )


@contextmanager
def _deterministic() -> Iterator[None]:
    """Turns on torch's deterministic algorithms while the context lasts. The switch is global."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _save(adapter: Any, out: Path, base: str) -> None:
    """Writes the two files of an adapter: no model card, no machine's paths, every list in order."""
    adapter.save_pretrained(out, safe_serialization=True, save_embedding_layers=False)
    for path in out.iterdir():
        if path.name not in {ADAPTER_CONFIG_NAME, WEIGHTS_NAME}:
            path.unlink()
    path = out / ADAPTER_CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    # peft keeps a set, so its order changes with every process.
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
