"""A report rests on this arithmetic: quantiles, goodput, ratios within pairs, slopes."""

import math

import pytest

from loadtests.bench.connection import StreamResult
from loadtests.bench.load_generator import TurnResult
from loadtests.bench.statistics import (
    added_latency,
    agreement,
    meets_slo,
    pair_ratios,
    quantile,
    slope,
    spread,
    summarize,
    turn_figures,
)
from loadtests.bench.workload import Slo

SLO = Slo(ttft_ms=100, itl_p99_ms=50)


def stream_result(ttft_s: float, gap_s: float = 0.01, count: int = 4, **changed: object) -> StreamResult:
    result = StreamResult(
        10.0, 200, [10 + ttft_s + number * gap_s for number in range(count)], 11.0, 64, count
    )
    for name, value in changed.items():
        setattr(result, name, value)
    return result


@pytest.mark.parametrize(
    ("percent", "value"), [(0, 1), (25, 1.75), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4)]
)
def test_quantiles_lie_between_the_nearest_ranks(percent: float, value: float):
    assert quantile([4, 1, 3, 2], percent) == pytest.approx(value)


def test_a_quantile_of_nothing_is_not_a_number():
    assert math.isnan(quantile([], 50))


@pytest.mark.parametrize(
    ("result", "counts"),
    [
        (stream_result(0.09), True),
        (stream_result(0.11), False),
        (stream_result(0.09, gap_s=0.06), False),
        (stream_result(0.09, count=1), True),
        (stream_result(0.09, error="broken off"), False),
        (stream_result(0.09, status=429), False),
        (stream_result(0.09, completion_tokens=0), False),
    ],
    ids=["in time", "late first", "slow tokens", "one token", "broken", "refused", "no usage"],
)
def test_goodput_counts_whole_answers_within_both_bounds(result: StreamResult, counts: bool):
    assert meets_slo(result, SLO) is counts


def test_a_turns_figures_leave_failures_out_and_count_them():
    failed = stream_result(0.05, status=500, error="oh")
    result = turn_figures(TurnResult([stream_result(0.05), stream_result(0.2), failed], 2.0), SLO)
    assert (result["tokens"], result["prompt_tokens"], result["tokens_per_s"]) == (8, 128, 4.0)
    assert (result["requests_per_s"], result["goodput_per_s"]) == (1.0, 0.5)
    assert (result["failed"], result["errors"]) == (1, ["oh"])
    assert result["ttft_p50_ms"] == 125
    assert result["itl_p99_ms"] == 10


def test_ratios_stay_within_their_pair():
    # A machine that halves its speed between the pairs: each pair still says the same.
    assert pair_ratios([90, 45], [100, 50]) == [0.9, 0.9]
    with pytest.raises(ValueError, match="shorter"):
        pair_ratios([1, 2], [1])


def test_a_spread_has_the_ends_and_the_quartiles():
    assert spread([0.9, 1.0, 1.1, 0.8, 1.2]) == {
        "median": 1.0, "low": 0.8, "high": 1.2, "q1": 0.9, "q3": 1.1, "pairs": 5,
    }  # fmt: skip


def test_over_turns_counts_are_summed_and_rates_are_medians():
    turns = [
        {"tokens": 10, "failed": 1, "tokens_per_s": rate, "errors": ["late"], "cpu": {"gateway": 1}}
        for rate in (1.0, 3.0, 2.0)
    ]
    assert summarize(turns) == {"tokens": 30, "failed": 3, "tokens_per_s": 2.0, "errors": ["late"]}


def test_added_latency_is_the_difference_of_quantiles_within_its_interval():
    theirs = [0.010 + 0.0001 * number for number in range(100)]
    result = added_latency([value + 0.002 for value in theirs], theirs, 50, seed=1)
    assert result["ms"] == 2.0
    assert result["low_ms"] < 2.0 < result["high_ms"]
    assert added_latency([value + 0.002 for value in theirs], theirs, 50, seed=1) == result


def test_a_slope_is_per_step():
    assert slope([5, 7, 9, 11]) == 2
    assert slope([5]) == 0


def test_one_value_that_stands_out_does_not_tilt_a_slope():
    assert slope([5, 5, 900, 5, 5, 5, 800]) == 0


def test_generators_agree_only_if_they_count_alike_and_what_was_asked_for():
    counted = {"prompt_tokens": 640, "completion_tokens": 320}
    assert agreement(counted, dict(counted), 320)["agree"]
    assert not agreement(counted, counted | {"prompt_tokens": 641}, 320)["agree"]
    assert not agreement(counted, dict(counted), 321)["agree"]
