"""Zipf's law: the item of rank r is chosen 1 / r^s as often as the first."""

from bisect import bisect
from itertools import accumulate


class Zipf:
    """Ranks 0 … count - 1, by popularity. `popular` is how many of the first make up half of all choices."""

    def __init__(self, count: int, exponent: float = 1.1) -> None:
        weights = [1 / (rank + 1) ** exponent for rank in range(count)]
        total = sum(weights)
        self._cumulative = [weight / total for weight in accumulate(weights)]
        self.popular = bisect(self._cumulative, 0.5) + 1

    def rank(self, uniform: float) -> int:
        """The rank that `uniform`, a number of [0, 1), means."""
        return min(bisect(self._cumulative, uniform), len(self._cumulative) - 1)
