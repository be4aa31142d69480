"""Collects what the clients of a run saw: rows, a timeline, and every request for the billing check."""

from collections import Counter
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from loadtests.load.client import StreamTiming
from loadtests.load.histogram import Histogram
from loadtests.load.request_record import Outcome, RequestRecord

SLICE_S = 5.0
TIMELINE_SLICES = 12


@dataclass(slots=True)
class Row:
    """Sums up the requests of one kind. `request` has the times of complete ones only."""

    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    request: Histogram = field(default_factory=Histogram)
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)

    def summary(self) -> dict[str, Any]:
        return {
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "codes": dict(self.codes),
            "request": self.request.summary(),
            "ttft": self.ttft.summary(),
            "itl": self.itl.summary(),
        }


@dataclass(slots=True)
class TimeSlice:
    """Sums up some seconds of the run. Users and memory are those at its end."""

    start_s: float
    end_s: float
    users: int
    memory_mb: int | None
    tokens: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    ttft: Histogram = field(default_factory=Histogram)
    itl: Histogram = field(default_factory=Histogram)

    def extend(self, other: "TimeSlice") -> None:
        """Appends the slice that came right after this one."""
        self.end_s, self.users, self.memory_mb = other.end_s, other.users, other.memory_mb
        self.tokens += other.tokens
        self.outcomes.update(other.outcomes)
        self.ttft.merge(other.ttft)
        self.itl.merge(other.itl)

    def summary(self) -> dict[str, Any]:
        return {
            "start_s": round(self.start_s, 1),
            "end_s": round(self.end_s, 1),
            "users": self.users,
            "tokens_per_s": round(self.tokens / max(self.end_s - self.start_s, 1e-9), 1),
            **{outcome.value: self.outcomes[outcome] for outcome in Outcome},
            "ttft": self.ttft.summary(),
            "itl": self.itl.summary(),
            "memory_mb": self.memory_mb,
        }


class Measurements:
    """Counts by row and by time. A request counts when it ends. Every record stays in memory: 0.4 KB each."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.rows: dict[str, Row] = {}
        self.slices: list[TimeSlice] = []
        self.tokens = 0  # completion tokens, as the answers reported them
        self._started_s = monotonic()
        self._open = TimeSlice(0.0, 0.0, 0, None)

    @property
    def elapsed_s(self) -> float:
        return monotonic() - self._started_s

    def add(self, record: RequestRecord, timing: StreamTiming) -> None:
        self.records.append(record)
        row = self.rows.setdefault(record.row, Row())
        for counter in (row.outcomes, self._open.outcomes):
            counter[record.outcome] += 1
        if record.code is not None:
            row.codes[record.code] += 1
        if record.outcome is Outcome.COMPLETE:
            row.request.add(record.latency_ms)
        if record.tokens is not None:
            self.tokens += record.tokens.completion
            self._open.tokens += record.tokens.completion
        for ttft, itl in ((row.ttft, row.itl), (self._open.ttft, self._open.itl)):
            if timing.first_ms is not None:
                ttft.add(timing.first_ms)
            for ms in timing.between_ms:
                itl.add(ms)

    def sample(self, users: int, memory_mb: int | None) -> None:
        """Ends the current slice and begins the next."""
        ended = self._open
        ended.end_s, ended.users, ended.memory_mb = self.elapsed_s, users, memory_mb
        if self.slices and ended.end_s - ended.start_s < SLICE_S / 2:
            self.slices[-1].extend(ended)  # the rest of a run is no slice of its own
        else:
            self.slices.append(ended)
        self._open = TimeSlice(ended.end_s, ended.end_s, users, memory_mb)

    def count(self, outcome: Outcome) -> int:
        return sum(row.outcomes[outcome] for row in self.rows.values())

    def codes(self, outcome: Outcome) -> dict[str, int]:
        return dict(Counter(e.code or "?" for e in self.records if e.outcome is outcome))

    def timeline(self, most: int = TIMELINE_SLICES) -> list[TimeSlice]:
        """Returns at most `most` slices; neighbours are merged until they are so few."""
        each = -(-len(self.slices) // most) if self.slices else 1
        merged = []
        for first in range(0, len(self.slices), each):
            begin, *following = self.slices[first : first + each]
            joined = TimeSlice(begin.start_s, begin.start_s, begin.users, begin.memory_mb)
            for piece in (begin, *following):
                joined.extend(piece)
            merged.append(joined)
        return merged
