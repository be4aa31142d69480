"""The gate passes an adapter whose whole interval is better than the base, and no other."""

from __future__ import annotations

from finetune.evaluate.gate import GATE_RULE, decide
from finetune.evaluate.metrics import compare


def test_a_better_adapter_passes_and_a_lucky_one_does_not() -> None:
    clear = compare([10.0] * 20, [8.0] * 20, [5] * 20, seed=0)
    assert decide(clear).passed
    lucky = compare([10.0] * 20, [*[10.5] * 18, 1.0, 1.0], [5] * 20, seed=0)
    assert lucky.difference < 0
    assert not decide(lucky).passed


def test_the_verdict_has_the_rule_and_the_interval() -> None:
    metrics = compare([10.0] * 20, [8.0] * 20, [5] * 20, seed=0)
    verdict = decide(metrics)
    assert verdict.rule == GATE_RULE
    assert f"{metrics.difference_ci95[1]:+.4f}" in verdict.reason
