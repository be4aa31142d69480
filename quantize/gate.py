"""The gate that a quantized base passes before it is published."""

from math import exp

from quantize.card import GateVerdict
from quantize.config import GateConfig
from quantize.statistics import Estimate


def decide(gate: GateConfig, difference: Estimate) -> GateVerdict:
    """Compares a difference in NLL (nats per token) with the gate's limit.

    The interval's upper end decides, so that few or noisy windows cannot pass by luck.
    """
    limit, worst = gate.perplexity_ratio_max, exp(difference.high)
    passed = worst <= limit
    return GateVerdict(
        rule=f"perplexity ratio at most {limit:g} at the upper end of its 95% interval",
        passed=passed,
        reason=f"perplexity ratio {exp(difference.mean):.4f}, at most {worst:.4f} with 95% confidence: "
        f"{'within' if passed else 'above'} the limit of {limit:g}",
    )
