"""Minutes by folder: the sums, the two levels, and what is over its budget."""

from pathlib import Path

import pytest

from tests.support.durations import by_folder, folders_of, keep_durations, read_budgets

TESTS = Path(__file__).parents[1]


def test_a_test_counts_for_two_levels_of_folders_and_one_in_tests_itself_for_its_file() -> None:
    assert folders_of("tests/serve/api/admin/test_keys.py") == ["serve", "serve/api"]
    assert folders_of("tests/finetune/test_job.py") == ["finetune"]
    assert folders_of("tests/test_demo.py") == ["test_demo.py"]


def test_a_folders_minutes_are_those_of_all_its_tests() -> None:
    durations = [
        ("tests/serve/api/test_a.py", 30.0),
        ("tests/serve/api/admin/test_b.py", 60.0),
        ("tests/serve/test_c.py", 90.0),
        ("tests/quantize/test_d.py", 120.0),
    ]
    rows = by_folder(durations, {})
    assert [(row.folder, row.minutes) for row in rows] == [
        ("quantize", 2.0),
        ("serve", 3.0),
        ("serve/api", 1.5),
    ]
    assert not any(row.over for row in rows)


def test_only_a_folder_beyond_its_budget_is_over() -> None:
    durations = [("tests/serve/api/test_a.py", 61.0), ("tests/quantize/test_b.py", 60.0)]
    rows = {row.folder: row for row in by_folder(durations, {"serve/api": 1, "quantize": 1})}
    assert {folder for folder, row in rows.items() if row.over} == {"serve/api"}
    assert str(rows["serve/api"]).endswith("over its budget")
    assert "of 1 " in str(rows["quantize"])


def test_folders_that_take_next_to_nothing_are_left_out() -> None:
    assert by_folder([("tests/quantize/test_d.py", 3.0)], {}) == []


@pytest.mark.parametrize("folder", read_budgets())
def test_a_budget_is_of_a_folder_that_there_is(folder: str) -> None:
    assert (TESTS / folder).exists()


def test_a_second_run_adds_its_durations_to_those_of_the_first(tmp_path: Path) -> None:
    file = tmp_path / "build" / "minutes.json"
    assert keep_durations(file, [("tests/serve/test_a.py", 60.0)]) == [("tests/serve/test_a.py", 60.0)]
    both = keep_durations(file, [("tests/system/test_b.py", 30.0)])
    assert both == [("tests/serve/test_a.py", 60.0), ("tests/system/test_b.py", 30.0)]
