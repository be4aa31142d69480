"""Zipf's law, times in buckets, the steps of a ramp, the phases of bursts and floods."""

import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.load.client import StreamTiming
from loadtests.load.histogram import Histogram
from loadtests.load.measurements import SLICE_S, Measurements
from loadtests.load.phases import burst_wait_s, flood_begins_s
from loadtests.load.ramp_schedule import RampSchedule
from loadtests.load.request_record import Outcome, RequestRecord
from loadtests.load.zipf import Zipf
from serve.billing.pricing.plans import Tokens


def test_the_second_is_chosen_as_often_as_zipf_says() -> None:
    zipf, seeded = Zipf(24, exponent=1.0), random.Random(1)
    chosen = Counter(zipf.rank(seeded.random()) for _ in range(50_000))
    assert chosen[0] / chosen[1] == pytest.approx(2, rel=0.05)
    assert chosen[0] / chosen[9] == pytest.approx(10, rel=0.15)
    assert set(chosen) == set(range(24))


def test_the_popular_ones_are_half_of_all_choices() -> None:
    zipf, seeded = Zipf(100), random.Random(1)
    ranks = [zipf.rank(seeded.random()) for _ in range(20_000)]
    assert (
        sum(rank < zipf.popular for rank in ranks) >= 10_000 > sum(rank < zipf.popular - 1 for rank in ranks)
    )


@given(st.integers(1, 200), st.floats(0, 1))
def test_every_number_means_a_rank(count: int, uniform: float) -> None:
    assert 0 <= Zipf(count).rank(uniform) < count


@given(st.lists(st.floats(0.01, 1e5), min_size=1, max_size=200))
def test_a_quantile_is_off_by_one_percent_at_most(times: list[float]) -> None:
    histogram, ordered = Histogram(), sorted(times)
    for ms in times:
        histogram.add(ms)
    assert histogram.quantile_ms(0.5) == pytest.approx(ordered[(len(times) + 1) // 2 - 1], rel=0.0101)
    assert histogram.quantile_ms(1.0) == pytest.approx(ordered[-1], rel=0.0101)


def test_merged_times_are_as_if_they_had_been_added_to_one() -> None:
    first, second, both = Histogram(), Histogram(), Histogram()
    for ms in range(1, 100):
        (first if ms % 3 else second).add(ms)
        both.add(ms)
    first.merge(second)
    assert first.summary() == both.summary()


def test_nothing_has_no_quantile() -> None:
    assert Histogram().quantile_ms(0.5) is None


def run_ramp(rate: "dict[int, float]", most: int, step_s: float = 8.0) -> RampSchedule:
    """Runs a ramp, second by second, on a service that makes `rate` tokens a second with so many users."""
    schedule, tokens, users = RampSchedule(most, step_s), 0.0, 1
    for second in range(1000):
        now = schedule.users_at(float(second), int(tokens))
        if now is None:
            return schedule
        users = now
        tokens += rate[users]
    raise AssertionError("the ramp did not end")


def test_a_ramp_ends_two_steps_after_more_users_bring_nothing() -> None:
    schedule = run_ramp({1: 100, 2: 200, 4: 380, 8: 385, 16: 380, 32: 500}, most=64)
    assert [step.users for step in schedule.steps] == [1, 2, 4, 8, 16]
    assert schedule.saturated
    knee = schedule.knee()
    assert knee is not None
    assert (knee.users, knee.tokens_per_s) == (4, 380)


def test_a_ramp_that_never_saturates_ends_with_all_its_users() -> None:
    schedule = run_ramp({1: 100, 2: 200, 4: 400, 6: 600}, most=6)
    assert [step.users for step in schedule.steps] == [1, 2, 4, 6]
    assert not schedule.saturated


def test_one_slow_step_is_no_saturation() -> None:
    schedule = run_ramp({1: 100, 2: 200, 4: 150, 8: 800, 16: 1600}, most=16)
    assert [step.users for step in schedule.steps] == [1, 2, 4, 8, 16]


def test_a_burst_is_at_the_end_of_each_period() -> None:
    assert [burst_wait_s(at) for at in (0.0, 9.0, 10.0, 14.9, 15.0, 24.0)] == [10, 1, 0, 0, 10, 1]


def test_a_flood_leaves_a_third_of_the_run_alone() -> None:
    assert flood_begins_s(60) == 20


def complete(tokens: int) -> RequestRecord:
    return RequestRecord(
        "row", "t", "m", 10, 64, "req_1", Outcome.COMPLETE, 200, None, Tokens(5, 0, tokens), tokens
    )


def test_the_timeline_of_a_run_loses_nothing_when_slices_are_taken_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("loadtests.load.measurements.monotonic", lambda: now_s)
    measurements = Measurements()
    for number in range(31):
        measurements.add(complete(tokens=number), StreamTiming(0.0, 0.0, 12.0, [3.0]))
        now_s += SLICE_S
        measurements.sample(users=number, memory_mb=number)
    now_s += SLICE_S / 10
    measurements.sample(users=0, memory_mb=99)  # what is left at the end is no slice of its own
    timeline = measurements.timeline(most=12)
    assert len(measurements.slices) == 31
    assert len(timeline) <= 12
    assert sum(part.tokens for part in timeline) == measurements.tokens == sum(range(31))
    assert sum(part.outcomes[Outcome.COMPLETE] for part in timeline) == 31
    assert (timeline[0].start_s, timeline[-1].end_s, timeline[-1].memory_mb) == (0.0, now_s, 99)
    assert all(part.end_s == following.start_s for part, following in pairwise(timeline))
