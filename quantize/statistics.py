"""The difference between two models on the same windows, with its confidence interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist, fmean, stdev


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Estimates the mean of `after - before` over windows, in nats per token, with its 95% interval.

    Both models read the same windows, so what makes a window hard for both cancels, and the interval is far
    narrower than that of either mean (Miller, "Adding Error Bars to Evals", arXiv:2411.00640, paired
    differences). Windows, not tokens, are the independent units: tokens of one window share their context.
    """
    differences = [second - first for first, second in zip(before, after, strict=True)]
    mean = fmean(differences)
    margin = _student_t_975(len(differences) - 1) * stdev(differences) / sqrt(len(differences))
    return Estimate(mean, mean - margin, mean + margin)


def _student_t_975(freedom: int) -> float:
    """Returns Student's t, 97.5% quantile (Abramowitz & Stegun, 26.7.5).

    It is within 0.001 from 7 degrees of freedom on.
    """
    z = NormalDist().inv_cdf(0.975)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
