"""The gate compares the worse end of the interval with its limit."""

from math import exp, log

import pytest

from quantize.config import GateConfig
from quantize.gate import decide
from quantize.statistics import Estimate


@pytest.mark.parametrize(("limit", "passed"), [(1.2, True), (1.1, False)])
def test_the_upper_end_of_the_interval_decides(limit: float, passed: bool) -> None:
    verdict = decide(GateConfig(perplexity_ratio_max=limit), Estimate(log(1.05), log(1.0), log(1.15)))
    assert verdict.passed is passed
    assert f"{exp(log(1.15)):.4f}" in verdict.reason
