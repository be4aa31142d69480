"""Metrics are paired: an adapter that does nothing differs from its base by exactly zero."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model

from finetune.base_model import load_model
from finetune.errors import TooFewRows
from finetune.evaluate.gate import decide
from finetune.evaluate.metrics import compare, evaluate
from tests.support.finetune_samples import lesson, write_lines


@pytest.fixture(scope="module")
def untrained(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter before its first training step: its matrix B is zero."""
    directory = tmp_path_factory.mktemp("untrained")
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    get_peft_model(load_model(tiny_base), config).save_pretrained(directory, save_embedding_layers=False)
    return directory


def test_an_untrained_adapter_differs_by_exactly_zero_and_fails_the_gate(
    tiny_base: Path, untrained: Path, tmp_path: Path
) -> None:
    heldout = write_lines(tmp_path / "heldout.jsonl", lesson(5))
    metrics = evaluate(tiny_base, untrained, heldout, max_length_tokens=256, seed=0)
    assert metrics.difference == 0
    assert metrics.difference_ci95 == (0, 0)
    assert metrics.base_nll == metrics.adapter_nll
    assert not decide(metrics).passed


def test_too_few_held_out_rows_are_not_measured(tiny_base: Path, untrained: Path, tmp_path: Path) -> None:
    heldout = write_lines(tmp_path / "heldout.jsonl", lesson(2))
    with pytest.raises(TooFewRows):
        evaluate(tiny_base, untrained, heldout, max_length_tokens=256, seed=0)


def test_means_are_weighted_by_tokens() -> None:
    metrics = compare([4.0, 2.0, 6.0], [1.0, 1.0, 1.0], [1, 2, 3], seed=0)
    assert metrics.base_nll == pytest.approx(2.0)
    assert metrics.adapter_nll == pytest.approx(0.5)
    assert metrics.difference == pytest.approx(-1.5)
    assert metrics.base_perplexity == pytest.approx(math.exp(2))
    assert (metrics.heldout_rows, metrics.heldout_answer_tokens) == (3, 6)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    trials, covered = 200, 0
    for _ in range(trials):
        differences = random.normal(-0.3, 1.0, size=60)
        low, high = compare([0.0] * 60, differences.tolist(), [1] * 60, seed=0, resamples=500).difference_ci95
        covered += low <= -0.3 <= high
    assert 0.89 <= covered / trials <= 0.99


def test_the_same_seed_gives_the_same_interval() -> None:
    base, adapter, tokens = [3.0, 5.0, 4.0, 9.0], [1.0, 6.0, 2.0, 3.0], [2, 3, 2, 4]
    assert compare(base, adapter, tokens, seed=4) == compare(base, adapter, tokens, seed=4)


def test_a_ruined_model_fails_the_gate_and_not_the_arithmetic() -> None:
    metrics = compare([1.0] * 5, [1e5] * 5, [1] * 5, seed=0)
    assert math.isfinite(metrics.adapter_perplexity)
    assert not decide(metrics).passed
