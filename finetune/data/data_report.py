"""The report on a customer's file: which lines are kept, dropped, or contradictory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_LINES_SHOWN = 12


@dataclass(frozen=True, slots=True)
class DataReport:
    """Counts and line numbers of a customer's file.

    `dropped` maps a reason to line numbers, counted from 1; `contradictory` lines are kept. `source` is the
    file's name without its folder, so that the report names no path of this machine.
    """

    source: str
    source_sha256: str
    rows: int
    dropped: Mapping[str, tuple[int, ...]]
    contradictory: tuple[int, ...]
    train: int
    heldout: int
    heldout_fraction: float
    seed: int

    @property
    def kept(self) -> int:
        return self.train + self.heldout

    @property
    def dropped_counts(self) -> dict[str, int]:
        return {reason: len(lines) for reason, lines in self.dropped.items()}

    def to_dict(self) -> dict[str, object]:
        """Returns the report as JSON values, as in report.json."""
        return {
            "source": self.source,
            "source_sha256": self.source_sha256,
            "rows": self.rows,
            "kept": self.kept,
            "train": self.train,
            "heldout": self.heldout,
            "heldout_fraction": self.heldout_fraction,
            "seed": self.seed,
            "dropped": {
                reason: {"count": len(lines), "lines": list(lines)} for reason, lines in self.dropped.items()
            },
            "warnings": {
                "contradictory": {"count": len(self.contradictory), "lines": list(self.contradictory)}
            },
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def to_table(self) -> Table:
        """Returns a rich table: one line per reason, with the first line numbers to look at."""
        from rich.table import Table

        table = Table()
        table.add_column("outcome", no_wrap=True)
        table.add_column("rows", justify="right", no_wrap=True)
        table.add_column("lines", overflow="fold")
        table.add_row("kept for training", str(self.train), "")
        table.add_row("kept, held out", str(self.heldout), "")
        for reason, lines in self.dropped.items():
            table.add_row(f"dropped: {reason}", str(len(lines)), _listed(lines), style="red")
        if self.contradictory:
            table.add_row(
                "kept, but contradictory",
                str(len(self.contradictory)),
                _listed(self.contradictory),
                style="yellow",
            )
        return table


def _listed(lines: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, lines[:_LINES_SHOWN]))
    return f"{shown}, …" if len(lines) > _LINES_SHOWN else shown
