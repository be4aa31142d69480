"""What all clients of a run saw, together: its rows, its course, and every request for the reconciliation."""

from collections import Counter
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from loadtests.load.client import Gaps
from loadtests.load.exchange import Exchange, Outcome
from loadtests.load.histogram import Histogram

SLICE_S = 5.0
SLICES_SHOWN = 12


@dataclass(slots=True)
class Row:
    """The exchanges of one kind. `request` times are those of complete ones."""

    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    request: Histogram = field(default_factory=Histogram)
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)

    def figures(self) -> dict[str, Any]:
        return {
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "codes": dict(self.codes),
            "request": self.request.figures(),
            "ttft": self.ttft.figures(),
            "itl": self.itl.figures(),
        }


@dataclass(slots=True)
class Slice:
    """Some seconds of the run. Users and memory are as they were at the end of it."""

    start_s: float
    end_s: float
    users: int
    memory_mb: int | None
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)

    def extend(self, other: "Slice") -> None:
        """By what came right after it."""
        self.end_s, self.users, self.memory_mb = other.end_s, other.users, other.memory_mb
        self.tokens += other.tokens
        self.outcomes.update(other.outcomes)
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)

    def figures(self) -> dict[str, Any]:
        return {
            "start_s": round(self.start_s, 1),
            "end_s": round(self.end_s, 1),
            "users": self.users,
            "tokens_per_s": round(self.tokens / max(self.end_s - self.start_s, 1e-9), 1),
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "ttft": self.ttft.figures(),
            "itl": self.itl.figures(),
            "memory_mb": self.memory_mb,
        }


class Tally:
    """Counts by row and by time. An exchange counts when it ends; every one is kept (0.4 KB each)."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.rows: dict[str, Row] = {}
        self.slices: list[Slice] = []
        self.tokens = 0  # generated, as the answers said
        self._started_s = monotonic()
        self._open = Slice(0.0, 0.0, 0, None)

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._started_s

    def add(self, exchange: Exchange, gaps: Gaps) -> None:
        self.exchanges.append(exchange)
        row = self.rows.setdefault(exchange.row, Row())
        for counter in (row.outcomes, self._open.outcomes):
            counter[exchange.outcome] += 1
        if exchange.code is not None:
            row.codes[exchange.code] += 1
        if exchange.outcome is Outcome.COMPLETE:
            row.request.add(exchange.latency_ms)
        if exchange.tokens is not None:
            self.tokens += exchange.tokens.completion
            self._open.tokens += exchange.tokens.completion
        for ttft, itl in ((row.ttft, row.itl), (self._open.ttft, self._open.itl)):
            if gaps.first_ms is not None:
                ttft.add(gaps.first_ms)
            for ms in gaps.between_ms:
                itl.add(ms)

    def sample(self, users: int, memory_mb: int | None) -> None:
        """The end of a slice."""
        done = self._open
        done.end_s, done.users, done.memory_mb = self.elapsed_s, users, memory_mb
        if self.slices and done.end_s - done.start_s < SLICE_S / 2:
            self.slices[-1].extend(done)  # what was left at the end
        else:
            self.slices.append(done)
        self._open = Slice(done.end_s, done.end_s, users, memory_mb)

    def count(self, outcome: Outcome) -> int:
        return sum(row.outcomes[outcome] for row in self.rows.values())

    def codes(self, outcome: Outcome) -> dict[str, int]:
        return dict(Counter(e.code or "?" for e in self.exchanges if e.outcome is outcome))

    def course(self, most: int = SLICES_SHOWN) -> list[Slice]:
        """The slices, neighbours taken together until they are at most `most`."""
        each = -(-len(self.slices) // most) if self.slices else 1
        merged = []
        for first in range(0, len(self.slices), each):
            begin, *following = self.slices[first : first + each]
            whole = Slice(begin.start_s, begin.start_s, begin.users, begin.memory_mb)
            for one in (begin, *following):
                whole.extend(one)
            merged.append(whole)
        return merged
