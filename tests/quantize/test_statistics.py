"""The interval is paired, exact at zero, and covers the true difference as often as it claims."""

import random
from statistics import fmean

import pytest

from quantize.statistics import _student_t_975, paired_difference


def test_identical_models_differ_by_exactly_nothing() -> None:
    nlls = [3.1, 2.7, 4.0, 3.3]
    difference = paired_difference(nlls, nlls)
    assert (difference.low, difference.mean, difference.high) == (0, 0, 0)


def test_what_is_common_to_both_models_cancels() -> None:
    before = [1.0, 50.0, 3.0, 900.0, 5.0, 6.0, 7.0, 8.0]
    after = [nll + 0.25 for nll in before]
    difference = paired_difference(before, after)
    assert difference.low == pytest.approx(0.25)
    assert difference.high == pytest.approx(0.25)


def test_swapping_the_models_mirrors_the_interval() -> None:
    before, after = [1.0, 2.0, 3.0], [1.5, 2.1, 3.9]
    forth, back = paired_difference(before, after), paired_difference(after, before)
    assert (forth.low, forth.mean, forth.high) == pytest.approx((-back.high, -back.mean, -back.low))


def test_windows_must_pair_up() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("freedom", "tabled"), [(7, 2.3646), (15, 2.1314), (31, 2.0395), (1000, 1.9623)])
def test_quantiles_agree_with_the_table(freedom: int, tabled: float) -> None:
    assert _student_t_975(freedom) == pytest.approx(tabled, abs=1e-3)


def test_the_interval_covers_the_truth_in_95_of_100_experiments() -> None:
    rng = random.Random(0)
    covered = []
    for _ in range(4000):
        before = [rng.gauss(3, 1) for _ in range(8)]
        difference = paired_difference(before, [nll + rng.gauss(0.1, 0.05) for nll in before])
        covered.append(difference.low <= 0.1 <= difference.high)
    assert fmean(covered) == pytest.approx(0.95, abs=0.012)
