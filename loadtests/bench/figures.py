"""From answers to figures, and from pairs to a median and its spread."""

import itertools
import random
import statistics
from collections.abc import Sequence
from itertools import chain
from typing import Any

from loadtests.bench.connection import Answer
from loadtests.bench.load import Run
from loadtests.bench.work import Slo

QUANTILES = (50, 90, 99)
RESAMPLES = 500


def quantile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy's default is."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def meets(answer: Answer, slo: Slo) -> bool:
    """Whether one request was answered in full and in time."""
    if not answer.ok or answer.ttft_s * 1000 > slo.ttft_ms:
        return False
    return not answer.gaps_s or quantile(answer.gaps_s, 99) * 1000 <= slo.itl_p99_ms


def figures(run: Run, slo: Slo) -> dict[str, Any]:
    """One turn's figures; latencies in ms, of the requests that were answered."""
    answered = [answer for answer in run.answers if answer.ok]
    tokens = sum(answer.completion_tokens for answer in answered)
    gaps_s = list(chain.from_iterable(answer.gaps_s for answer in answered))
    return {
        "tokens": tokens,
        "prompt_tokens": sum(answer.prompt_tokens for answer in answered),
        "wall_s": round(run.wall_s, 4),
        "tokens_per_s": round(tokens / run.wall_s, 2),
        "requests_per_s": round(len(answered) / run.wall_s, 3),
        "goodput_per_s": round(sum(meets(answer, slo) for answer in answered) / run.wall_s, 3),
        "failed": len(run.answers) - len(answered),
        "errors": sorted(
            {answer.error or f"status {answer.status}" for answer in run.answers if not answer.ok}
        )[:3],
        **{f"ttft_p{p}_ms": ms(quantile([a.ttft_s for a in answered], p)) for p in QUANTILES},
        **{f"itl_p{p}_ms": ms(quantile(gaps_s, p)) for p in QUANTILES},
    }


def ms(seconds: float) -> float:
    return round(seconds * 1000, 2)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median, lowest, highest, and the two quartiles."""
    named = {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "q1": quantile(values, 25),
        "q3": quantile(values, 75),
    }
    return {name: round(value, digits) for name, value in named.items()} | {"pairs": len(values)}


def paired(values: Sequence[float], baseline: Sequence[float]) -> list[float]:
    """Each turn's ratio to the baseline's turn of the same pair."""
    return [value / base for value, base in zip(values, baseline, strict=True) if base]


def over(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the turns; counts of requests and tokens are summed."""
    summed = ("tokens", "prompt_tokens", "failed", "wall_s")
    names = [name for name, value in turns[0].items() if isinstance(value, int | float)]
    medians = {n: round(statistics.median(t[n] for t in turns), 3) for n in names if n not in summed}
    totals = {name: round(sum(turn[name] for turn in turns), 3) for name in summed if name in names}
    errors = sorted({error for turn in turns for error in turn.get("errors", ())})
    return totals | medians | ({"errors": errors} if errors else {})


def added(
    values_s: Sequence[float], baseline_s: Sequence[float], percent: float, seed: int
) -> dict[str, float]:
    """The difference of two quantiles in ms, and the 95 % interval of its bootstrap."""
    rng = random.Random(seed)

    def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
        return quantile(ours, percent) - quantile(theirs, percent)

    drawn = [
        difference(rng.choices(values_s, k=len(values_s)), rng.choices(baseline_s, k=len(baseline_s)))
        for _ in range(RESAMPLES)
    ]
    return {
        "ms": ms(difference(values_s, baseline_s)),
        "low_ms": ms(quantile(drawn, 2.5)),
        "high_ms": ms(quantile(drawn, 97.5)),
    }


def slope(values: Sequence[float]) -> float:
    """Per step, the median over all pairs (P. K. Sen, 1968): a few values that stand out do not tilt it."""
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median([(b - a) / (j - i) for (i, a), (j, b) in pairs] or [0.0])


def agreement(ours: dict[str, int], theirs: dict[str, int], expected: int) -> dict[str, Any]:
    """Whether two load generators counted the same tokens, and as many as were asked for."""
    same = ours == theirs
    return {
        "ours": ours,
        "vllm_benchmarks": theirs,
        "asked_for": expected,
        "agree": same and ours["completion_tokens"] == expected,
    }
