"""Measures the time between a request's tokens: inter-token latency.

This is on the path of each token. So a request counts into a list of its own (a clock, a bisection, two
additions), and the histogram gets the sums once, when the request has ended.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import Protocol

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

BUCKETS_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Counted(Protocol):
    """Describes new tokens: the choice that they belong to, and their number."""

    @property
    def index(self) -> int: ...

    @property
    def tokens(self) -> int: ...


class TokenLatency:
    """Counts the latencies of a request's tokens after each choice's first, by bucket; the last has no bound.

    Tokens that come in one delta share the time since the one before.
    """

    __slots__ = ("_last_s", "counts", "sum_s")

    def __init__(self, choices: int) -> None:
        self._last_s = [0.0] * choices
        self.counts = [0] * (len(BUCKETS_S) + 1)
        self.sum_s = 0.0

    def note(self, deltas: Sequence[Counted]) -> None:
        """Counts tokens that have arrived now."""
        now_s, last_s = monotonic(), self._last_s
        for delta in deltas:
            if tokens := delta.tokens:
                index = delta.index
                if before_s := last_s[index]:
                    gap_s = now_s - before_s
                    self.counts[bisect_left(BUCKETS_S, gap_s / tokens)] += tokens
                    self.sum_s += gap_s
                last_s[index] = now_s


class TokenLatencyHistogram(Collector):
    """Sums the latencies of many requests by labels. `buckets_s` are some of BUCKETS_S: each is a series."""

    def __init__(self, name: str, text: str, labels: Sequence[str], buckets_s: Sequence[float]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._bounds = [str(float(bound)) for bound in buckets_s] + ["+Inf"]
        self._bucket_of = [bisect_left(buckets_s, bound) for bound in BUCKETS_S] + [len(buckets_s)]
        self._series: dict[tuple[str, ...], tuple[list[int], list[float]]] = {}

    def add(self, labels: tuple[str, ...], latency: TokenLatency) -> None:
        counts, sums = self._series.setdefault(labels, ([0] * len(self._bounds), [0.0]))
        for bucket, count in zip(self._bucket_of, latency.counts, strict=True):
            counts[bucket] += count
        sums[0] += latency.sum_s

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        series = list(self._series.items())  # at once: this may be another thread
        for labels, (counts, (sum_s,)) in series:
            cumulative, buckets = 0, []
            for bound, count in zip(self._bounds, counts, strict=True):
                cumulative += count
                buckets.append((bound, float(cumulative)))
            family.add_metric(labels, buckets, sum_s)
        return [family]
