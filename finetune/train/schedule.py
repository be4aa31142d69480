"""The schedule of a training run: which rows each step reads, and at which learning rate."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from finetune.recipe import Recipe


def batches(rows: int, recipe: Recipe) -> Iterator[list[int]]:
    """Yields the row numbers of each step.

    Every epoch has a new seeded order. Its last batch may be smaller.
    """
    shuffle = random.Random(recipe.seed).shuffle
    for _ in range(recipe.epochs):
        order = list(range(rows))
        shuffle(order)
        for start in range(0, rows, recipe.batch_size):
            yield order[start : start + recipe.batch_size]


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """Returns the learning rate of a step (from 1): linearly up in the warm-up, then down to nearly 0."""
    warmup = math.ceil(recipe.warmup_fraction * steps)
    share = step / warmup if step <= warmup else (steps - step + 1) / (steps - warmup + 1)
    return recipe.learning_rate * share
