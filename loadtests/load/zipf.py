"""Draws by Zipf's law: the item of rank r is chosen 1 / r^s as often as the first."""

from bisect import bisect
from itertools import accumulate


class Zipf:
    """Draws ranks 0 … count - 1. The first `popular` ranks make up half of all choices."""

    def __init__(self, count: int, exponent: float = 1.1) -> None:
        weights = [1 / (rank + 1) ** exponent for rank in range(count)]
        total = sum(weights)
        self._cumulative = [weight / total for weight in accumulate(weights)]
        self.popular = bisect(self._cumulative, 0.5) + 1

    def rank(self, uniform: float) -> int:
        """Returns the rank for `uniform`, a random number of [0, 1)."""
        return min(bisect(self._cumulative, uniform), len(self._cumulative) - 1)
