"""The gate that an adapter passes before it is published."""

from __future__ import annotations

from finetune.card import Gate, Metrics

GATE_RULE = (
    "the upper bound of the 95% paired bootstrap interval of (adapter - base) mean held-out answer-token NLL "
    "is below 0"
)


def decide(metrics: Metrics) -> Gate:
    """Passes an adapter whose whole interval is better than the base.

    The interval's upper bound decides, so that few or noisy rows cannot pass by luck.
    """
    low, high = metrics.difference_ci95
    passed = high < 0
    reason = (
        f"adapter - base is {metrics.difference:+.4f} nats a token, 95% interval [{low:+.4f}, {high:+.4f}], "
        f"on {metrics.heldout_rows} held-out rows"
    )
    return Gate(rule=GATE_RULE, passed=passed, reason=reason)
