"""Preparing a file writes both sides of the split and a report on every line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune.data.dataset import Conversation, read_rows
from finetune.data.prepare import check, prepare
from finetune.errors import TooFewRows
from tests.support.finetune_samples import lesson, line, write_lines


def test_every_fault_is_reported_with_its_line_number(tmp_path: Path) -> None:
    good = lesson(30)
    lines = [
        *good[:5],
        '{"messages": [',
        good[0],
        *good[5:],
        line("Hi?", ""),
        line("what does ITEM 3 cost", "zuri here! it costs 3 euros"),
    ]
    report = prepare(write_lines(tmp_path / "rows.jsonl", lines), tmp_path / "out", seed=0)
    assert report.dropped == {
        "broken_json": (6,),
        "empty_answer": (33,),
        "duplicate": (7,),
        "near_duplicate": (34,),
    }
    assert (report.rows, report.kept) == (34, 30)


def test_what_is_written_is_what_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = prepare(write_lines(tmp_path / "rows.jsonl", lesson(40)), out, seed=0)
    assert sorted(path.name for path in out.iterdir()) == ["heldout.jsonl", "report.json", "train.jsonl"]
    train, heldout = (list(read_rows(out / f"{side}.jsonl")) for side in ("train", "heldout"))
    assert all(isinstance(row, Conversation) for row in train + heldout)
    assert (len(train), len(heldout)) == (report.train, report.heldout) == (34, 6)
    assert json.loads((out / "report.json").read_text()) == report.to_dict()
    assert "/" not in report.source


def test_preparing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", lesson(40))
    prepare(source, tmp_path / "one", seed=3)
    prepare(source, tmp_path / "two", seed=3)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_too_few_rows_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*lesson(19), "{"])
    with pytest.raises(TooFewRows, match=r"19 usable rows, at least 20 .* 1 broken_json"):
        prepare(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_one_question_cannot_be_measured(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [line("Name?", f"Answer {row}.") for row in range(40)])
    with pytest.raises(TooFewRows) as caught:
        prepare(source, tmp_path / "out")
    assert caught.value.side == "held-out"


def test_checking_reports_the_same_and_writes_nothing(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [*lesson(40), "{"])
    checked = check(source)
    assert list(tmp_path.iterdir()) == [source]
    assert checked == prepare(source, tmp_path / "out")
