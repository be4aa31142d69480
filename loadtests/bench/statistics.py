"""Computes a turn's figures from its results, and medians and spreads over turns."""

import itertools
import random
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

from loadtests.bench.connection import StreamResult
from loadtests.bench.load_generator import TurnResult
from loadtests.bench.workload import Slo

QUANTILES = (50, 90, 99)
RESAMPLES = 500


def quantile(values: Sequence[float], percent: float) -> float:
    """Interpolates linearly between the two nearest ranks, like numpy's default."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def meets_slo(result: StreamResult, slo: Slo) -> bool:
    """Tells whether one request was answered in full and in time."""
    if not result.ok or result.ttft_s * 1000 > slo.ttft_ms:
        return False
    return not result.gaps_s or quantile(result.gaps_s, 99) * 1000 <= slo.itl_p99_ms


def turn_figures(turn: TurnResult, slo: Slo) -> dict[str, Any]:
    """Returns one turn's figures. Latencies are in ms, of the requests that were answered."""
    answered = [result for result in turn.results if result.ok]
    tokens = sum(result.completion_tokens for result in answered)
    gaps_s = list(chain.from_iterable(result.gaps_s for result in answered))
    return {
        "tokens": tokens,
        "prompt_tokens": sum(result.prompt_tokens for result in answered),
        "wall_s": round(turn.wall_s, 4),
        "tokens_per_s": round(tokens / turn.wall_s, 2),
        "requests_per_s": round(len(answered) / turn.wall_s, 3),
        "goodput_per_s": round(sum(meets_slo(result, slo) for result in answered) / turn.wall_s, 3),
        "failed": len(turn.results) - len(answered),
        "errors": sorted(
            {result.error or f"status {result.status}" for result in turn.results if not result.ok}
        )[:3],
        **{f"ttft_p{p}_ms": ms(quantile([result.ttft_s for result in answered], p)) for p in QUANTILES},
        **{f"itl_p{p}_ms": ms(quantile(gaps_s, p)) for p in QUANTILES},
    }


def ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Returns the median, the lowest, the highest and the two quartiles of one value per pair."""
    values_by_name = {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "q1": quantile(values, 25),
        "q3": quantile(values, 75),
    }
    return {name: round(value, digits) for name, value in values_by_name.items()} | {"pairs": len(values)}


def pair_ratios(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Divides each turn's value by the baseline's in the same pair."""
    return [value / base for value, base in zip(values, baseline, strict=True) if base]


def summarize(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns each figure's median over the turns, and the sums of requests and tokens."""
    summed = ("tokens", "prompt_tokens", "failed", "wall_s")
    names = [name for name, value in turns[0].items() if isinstance(value, int | float)]
    medians = {n: round(statistics.median(t[n] for t in turns), 3) for n in names if n not in summed}
    totals = {name: round(sum(turn[name] for turn in turns), 3) for name in summed if name in names}
    errors = sorted({error for turn in turns for error in turn.get("errors", ())})
    return totals | medians | ({"errors": errors} if errors else {})


def added_latency(
    values_s: Sequence[float], baseline_s: Sequence[float], percent: float, seed: int
) -> dict[str, float]:
    """Returns the difference of two quantiles in ms with its 95 % bootstrap interval."""
    rng = random.Random(seed)

    def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
        return quantile(ours, percent) - quantile(theirs, percent)

    resampled = [
        difference(rng.choices(values_s, k=len(values_s)), rng.choices(baseline_s, k=len(baseline_s)))
        for _ in range(RESAMPLES)
    ]
    return {
        "ms": ms(difference(values_s, baseline_s)),
        "low_ms": ms(quantile(resampled, 2.5)),
        "high_ms": ms(quantile(resampled, 97.5)),
    }


def slope(values: Sequence[float]) -> float:
    """Returns the change per step: the median over all pairs (P. K. Sen, 1968), robust to outliers."""
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median([(b - a) / (j - i) for (i, a), (j, b) in pairs] or [0.0])


def agreement(ours: dict[str, int], theirs: dict[str, int], expected: int) -> dict[str, Any]:
    """Compares the tokens that two load generators counted with each other and with the number asked for."""
    same = ours == theirs
    return {
        "ours": ours,
        "vllm_benchmarks": theirs,
        "asked_for": expected,
        "agree": same and ours["completion_tokens"] == expected,
    }
