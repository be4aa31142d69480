"""From a customer's file to `train.jsonl`, `heldout.jsonl` and `report.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from finetune.data.clean import clean
from finetune.data.report import DataReport
from finetune.data.rows import Conversation, Dropped, Fault, read_rows
from finetune.data.split import Split, split
from finetune.digest import file_sha256
from finetune.durable import write_durably
from finetune.errors import TooFewRows

HELDOUT_FRACTION = 0.15
# Under twenty rows there is nothing to learn; under three, no interval worth the name.
ROWS_MIN = 20
TRAIN_ROWS_MIN = 10
HELDOUT_ROWS_MIN = 3

TRAIN_NAME = "train.jsonl"
HELDOUT_NAME = "heldout.jsonl"
REPORT_NAME = "report.json"


def check(source: Path, *, heldout_fraction: float = HELDOUT_FRACTION, seed: int = 0) -> DataReport:
    """What `prepare` would do with a file, without writing anything and without a minimum of rows.

    Raises:
        DataUnreadable: the file as a whole cannot be read or is over a bound.
    """
    return _divide(source, heldout_fraction, seed)[0]


def prepare(
    source: Path, out: Path, *, heldout_fraction: float = HELDOUT_FRACTION, seed: int = 0
) -> DataReport:
    """Validate, clean and split a file into the folder `out`.

    Each file is written atomically, `report.json` last: a folder that has one is complete.

    Raises:
        DataUnreadable: the file as a whole cannot be read or is over a bound.
        TooFewRows: fewer than 20 rows are usable, or one side of the split is too small.
    """
    report, sides = _divide(source, heldout_fraction, seed)
    require_rows(report, source)
    out.mkdir(parents=True, exist_ok=True)
    write_durably(out / TRAIN_NAME, _lines(sides.train))
    write_durably(out / HELDOUT_NAME, _lines(sides.heldout))
    write_durably(out / REPORT_NAME, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    return report


def require_rows(report: DataReport, source: Path) -> None:
    """Raise TooFewRows unless both sides have enough rows to train on and to measure with."""
    for side, rows, rows_min in (
        ("usable", report.kept, ROWS_MIN),
        ("training", report.train, TRAIN_ROWS_MIN),
        ("held-out", report.heldout, HELDOUT_ROWS_MIN),
    ):
        if rows < rows_min:
            raise TooFewRows(source, side, rows, rows_min, report.dropped_counts)


def _divide(source: Path, heldout_fraction: float, seed: int) -> tuple[DataReport, Split]:
    parsed = list(read_rows(source))
    cleaned = clean(row for row in parsed if isinstance(row, Conversation))
    dropped = [row for row in parsed if isinstance(row, Dropped)] + list(cleaned.dropped)
    sides = split(cleaned.rows, fraction=heldout_fraction, seed=seed)
    report = DataReport(
        source=source.name,
        source_sha256=file_sha256(source),
        rows=len(parsed),
        dropped={
            fault.value: lines
            for fault in Fault
            if (lines := tuple(sorted(row.line for row in dropped if row.fault is fault)))
        },
        contradictory=cleaned.contradictory,
        train=len(sides.train),
        heldout=len(sides.heldout),
        heldout_fraction=heldout_fraction,
        seed=seed,
    )
    return report, sides


def _lines(rows: Sequence[Conversation]) -> str:
    return "".join(row.to_json() + "\n" for row in rows)
