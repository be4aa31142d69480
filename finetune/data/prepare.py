"""Prepares a customer's file: `train.jsonl`, `heldout.jsonl` and `report.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finetune.atomic_files import write_atomically
from finetune.data.clean import clean
from finetune.data.data_report import DataReport
from finetune.data.dataset import Conversation, DroppedRow, Fault, read_rows
from finetune.data.split import Split, split
from finetune.errors import TooFewRows
from finetune.hashing import file_sha256

HELDOUT_FRACTION = 0.15
# Fewer than twenty rows teach nothing; from fewer than three no useful interval can be computed.
ROWS_MIN = 20
TRAIN_ROWS_MIN = 10
HELDOUT_ROWS_MIN = 3

TRAIN_NAME = "train.jsonl"
HELDOUT_NAME = "heldout.jsonl"
REPORT_NAME = "report.json"


def check(source: Path, *, heldout_fraction: float = HELDOUT_FRACTION, seed: int = 0) -> DataReport:
    """Reports what `prepare` would do with a file. Writes nothing, and requires no minimum of rows.

    Raises:
        DataUnreadable: the file as a whole cannot be read or is over a bound.
    """
    return _prepare_rows(source, heldout_fraction, seed)[0]


def prepare(
    source: Path, out: Path, *, heldout_fraction: float = HELDOUT_FRACTION, seed: int = 0
) -> DataReport:
    """Validates, cleans and splits a file into the folder `out`.

    Each file is written atomically, `report.json` last: a folder that has one is complete.

    Raises:
        DataUnreadable: the file as a whole cannot be read or is over a bound.
        TooFewRows: fewer than 20 rows are usable, or one side of the split is too small.
    """
    report, sides = _prepare_rows(source, heldout_fraction, seed)
    require_rows(report, source)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / TRAIN_NAME, _lines(sides.train))
    write_atomically(out / HELDOUT_NAME, _lines(sides.heldout))
    write_atomically(out / REPORT_NAME, report.to_json() + "\n")
    return report


def require_rows(report: DataReport, source: Path) -> None:
    """Raises TooFewRows unless both sides have enough rows to train on and to measure with."""
    for side, rows, rows_min in (
        ("usable", report.kept, ROWS_MIN),
        ("training", report.train, TRAIN_ROWS_MIN),
        ("held-out", report.heldout, HELDOUT_ROWS_MIN),
    ):
        if rows < rows_min:
            raise TooFewRows(source, side, rows, rows_min, report.dropped_counts)


def _prepare_rows(source: Path, heldout_fraction: float, seed: int) -> tuple[DataReport, Split]:
    parsed = list(read_rows(source))
    cleaned = clean(row for row in parsed if isinstance(row, Conversation))
    dropped = [row for row in parsed if isinstance(row, DroppedRow)] + list(cleaned.dropped)
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
