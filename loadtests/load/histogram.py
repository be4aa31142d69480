"""Counts times in buckets that are 2 % wide, so hours of a soak need a few hundred numbers."""

import math
from collections import Counter

_LOG_WIDTH = math.log(1.02)
LEAST_MS = 0.01


class Histogram:
    """Counts times in ms. A quantile is off by 1 % at most; a time below LEAST_MS counts as LEAST_MS."""

    def __init__(self) -> None:
        self._buckets: Counter[int] = Counter()
        self.count = 0
        self.sum_ms = 0.0
        self.most_ms = 0.0

    def add(self, ms: float) -> None:
        self._buckets[round(math.log(max(ms, LEAST_MS)) / _LOG_WIDTH)] += 1
        self.count += 1
        self.sum_ms += ms
        self.most_ms = max(self.most_ms, ms)

    def merge(self, other: "Histogram") -> None:
        self._buckets.update(other._buckets)
        self.count += other.count
        self.sum_ms += other.sum_ms
        self.most_ms = max(self.most_ms, other.most_ms)

    def quantile_ms(self, q: float) -> float | None:
        """Returns the time that a part `q` of all times do not exceed; None if there is no time."""
        rank, seen = max(1, math.ceil(q * self.count)), 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(math.exp(bucket * _LOG_WIDTH), self.most_ms)
        return None

    def summary(self) -> dict[str, float | int | None]:
        rounded = {
            f"p{round(q * 100)}_ms": None if (ms := self.quantile_ms(q)) is None else round(ms, 2)
            for q in (0.5, 0.9, 0.99)
        }
        mean_ms = round(self.sum_ms / self.count, 2) if self.count else None
        return {"count": self.count, "mean_ms": mean_ms, **rounded, "most_ms": round(self.most_ms, 2)}
