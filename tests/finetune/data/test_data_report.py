"""A report has the same numbers as a table and as JSON."""

from __future__ import annotations

import json

from rich.console import Console

from finetune.data.data_report import DataReport

REPORT = DataReport(
    source="rows.jsonl",
    source_sha256="d" * 64,
    rows=40,
    dropped={"missing_messages": tuple(range(1, 15)), "duplicate": (20,)},
    contradictory=(21, 22),
    train=20,
    heldout=5,
    heldout_fraction=0.2,
    seed=0,
)


def test_the_counts_add_up() -> None:
    assert REPORT.kept == 25
    assert REPORT.dropped_counts == {"missing_messages": 14, "duplicate": 1}
    assert REPORT.kept + sum(REPORT.dropped_counts.values()) == REPORT.rows


def test_the_json_lists_every_line() -> None:
    report = json.loads(REPORT.to_json())
    assert report == REPORT.to_dict()
    assert report["dropped"]["missing_messages"] == {"count": 14, "lines": list(range(1, 15))}
    assert report["warnings"]["contradictory"]["lines"] == [21, 22]


def test_the_table_shows_whole_reasons_and_the_first_lines() -> None:
    console = Console(width=50, record=True)
    console.print(REPORT.to_table())
    text = console.export_text()
    assert "dropped: missing_messages" in text
    assert "14" in text
    assert "21, 22" in text
