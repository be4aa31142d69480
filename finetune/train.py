"""Training a LoRA adapter: one flat loop, float32 on the CPU, the same bytes for the same seed and data."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy

from finetune.base import load_model, load_tokenizer
from finetune.batch import answer_logits, bounded, pack
from finetune.card import ADAPTER_CONFIG_NAME, WEIGHTS_NAME
from finetune.errors import BaseUnusable, TooFewRows, TrainingDiverged
from finetune.recipe import Recipe
from finetune.stem import STEM_BYTES_MAX, layers_only, stem_bytes, stem_outputs
from finetune.tokens import load_examples

# step (from 1), steps in all, loss, tokens a second so far; the tokens of every row count, shared or not
OnStep = Callable[[int, int, float, float], None]


@dataclass(frozen=True, slots=True)
class Trained:
    """`rows_too_long` were left out for exceeding the recipe's max_length_tokens.

    `tokens` are what all steps read together.
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
) -> Trained:
    """Train on a prepared file and write adapter_config.json and adapter_model.safetensors into `out`.

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
    cut = _first_trained_layer(model, recipe)
    # A stem too large for memory is not kept: the layers below the cut then run again at every step.
    kept = cut if stem_bytes(model, examples) <= STEM_BYTES_MAX else 0
    stems = stem_outputs(model, examples, cut=kept) if kept else []

    torch.manual_seed(recipe.seed)
    adapter = get_peft_model(model, _lora(model, recipe, cut, base_dir)).train()
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=recipe.weight_decay)
    batches = list(_batches(len(examples), recipe))
    warmup = math.ceil(recipe.warmup_fraction * len(batches))
    tokens, loss_value, started = 0, math.nan, time.perf_counter()
    with _deterministic(), layers_only(model, kept, None):
        for step, chosen in enumerate(batches, start=1):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * _schedule(step, len(batches), warmup)
            answer_tokens = sum(examples[row].answer_tokens for row in chosen)
            loss_value = 0.0
            for group in bounded(chosen, examples):
                batch = pack([examples[row] for row in group])
                hidden = batch.gather([stems[row] for row in group]) if kept else None
                logits = answer_logits(model, batch, hidden)
                loss = cross_entropy(logits, batch.target, reduction="sum") / answer_tokens
                loss.backward()
                loss_value += loss.item()
            if not math.isfinite(loss_value):
                raise TrainingDiverged(step, loss_value)
            torch.nn.utils.clip_grad_norm_(weights, recipe.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(len(examples[row].ids) for row in chosen)
            if on_step:
                on_step(step, len(batches), loss_value, tokens / (time.perf_counter() - started))
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise TrainingDiverged(len(batches), loss_value)
    _save(adapter, out, base)
    rate = tokens / (time.perf_counter() - started)
    return Trained(len(examples), too_long, len(batches), loss_value, rate, tokens)


def _first_trained_layer(model: Any, recipe: Recipe) -> int:
    layers = int(model.config.num_hidden_layers)
    return max(0, layers - recipe.top_layers) if recipe.top_layers else 0


def _lora(model: Any, recipe: Recipe, cut: int, base_dir: Path) -> LoraConfig:
    # peft ignores a name that fits nothing as long as another one fits.
    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if missing := sorted(set(recipe.target_modules) - present):
        raise BaseUnusable(base_dir, f"it has no modules called {', '.join(missing)}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=recipe.dropout,
        target_modules=sorted(recipe.target_modules),
        layers_to_transform=list(range(cut, model.config.num_hidden_layers)) if cut else None,
    )


def _batches(rows: int, recipe: Recipe) -> Iterator[list[int]]:
    """Row numbers for every step: each epoch in a new seeded order, its last batch perhaps smaller."""
    shuffle = random.Random(recipe.seed).shuffle
    for _ in range(recipe.epochs):
        order = list(range(rows))
        shuffle(order)
        for start in range(0, rows, recipe.batch_size):
            yield order[start : start + recipe.batch_size]


def _schedule(step: int, steps: int, warmup: int) -> float:
    """Learning rate as a share of its peak: up in a line over `warmup` steps, then down to nearly 0."""
    return step / warmup if step <= warmup else (steps - step + 1) / (steps - warmup + 1)


@contextmanager
def _deterministic() -> Iterator[None]:
    """torch's deterministic algorithms while the context lasts; the switch is global."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _save(adapter: Any, out: Path, base: str) -> None:
    """Write the two files of an adapter: no model card, no machine's paths, every list in order."""
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
