"""Every epoch reads every row once, at a learning rate that rises and then falls."""

from __future__ import annotations

import pytest

from finetune.recipe import Recipe
from finetune.train.schedule import batches, learning_rate


def test_every_epoch_reads_each_row_once_in_an_order_of_its_own(recipe: Recipe) -> None:
    steps = list(batches(20, recipe))
    assert [len(batch) for batch in steps] == [8, 8, 4] * 3
    epochs = [[row for batch in steps[start : start + 3] for row in batch] for start in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert steps == list(batches(20, recipe))
    assert steps != list(batches(20, recipe.model_copy(update={"seed": 8})))


def test_the_learning_rate_peaks_after_the_warm_up(recipe: Recipe) -> None:
    warmed = recipe.model_copy(update={"warmup_fraction": 0.25, "learning_rate": 1.0})
    rates = [learning_rate(step, 8, warmed) for step in range(1, 9)]
    assert rates == pytest.approx([1 / 2, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])


def test_without_a_warm_up_the_first_step_is_the_fastest(recipe: Recipe) -> None:
    cold = recipe.model_copy(update={"warmup_fraction": 0.0, "learning_rate": 1.0})
    assert [learning_rate(step, 2, cold) for step in (1, 2)] == pytest.approx([2 / 3, 1 / 3])
