"""Prints at the end of a run how many minutes each folder took, and which went beyond its budget.

A plugin that `tests/conftest.py` loads. The budgets are `[tool.bespoke.test_minutes]` of pyproject.toml, in
minutes on two quiet cores. A folder beyond its budget is a warning; the run does not fail of it.

`make test` is two runs. `--minutes-file` carries the first one's durations to the second one's table.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pytest

LEVELS = 2  # of folders below tests/
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@dataclass(frozen=True)
class Row:
    folder: str
    minutes: float
    budget_minutes: float | None

    @property
    def over(self) -> bool:
        return self.budget_minutes is not None and self.minutes > self.budget_minutes

    def __str__(self) -> str:
        budget = "" if self.budget_minutes is None else f" of {self.budget_minutes:g}"
        return f"{self.minutes:6.1f}{budget:<8} {self.folder}{'  over its budget' if self.over else ''}"


def folders_of(path: str) -> list[str]:
    """The folders of a test's path that are counted: `tests/serve/api/test_x.py` is in serve and serve/api.

    A test that lies in tests/ itself is counted under its file's name.
    """
    _, *folders, file = PurePosixPath(path).parts
    counted = folders[:LEVELS] or [file]
    return ["/".join(counted[: level + 1]) for level in range(len(counted))]


def by_folder(seconds_of: Iterable[tuple[str, float]], budgets: Mapping[str, float]) -> list[Row]:
    """The minutes of each folder, a folder's sub-folders below it. Folders under 0.1 minutes are left out.

    `seconds_of` holds a test's path and seconds, set-up and tear-down included. `budgets` are in minutes.
    """
    seconds: dict[str, float] = {}
    for path, duration_s in seconds_of:
        for folder in folders_of(path):
            seconds[folder] = seconds.get(folder, 0.0) + duration_s
    rows = (Row(folder, total_s / 60, budgets.get(folder)) for folder, total_s in sorted(seconds.items()))
    return [row for row in rows if row.minutes >= 0.1 or row.over]


def read_budgets(pyproject: Path = PYPROJECT) -> dict[str, float]:
    table = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    budgets: dict[str, float] = table["tool"]["bespoke"]["test_minutes"]
    return budgets


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes-file",
        type=Path,
        help="adds this run's durations to those in this file, prints them all",
    )


def keep_durations(file: Path, durations: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Adds `durations` to those that earlier runs left in `file`, and returns them all."""
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    both = [(path, duration_s) for path, duration_s in earlier] + durations
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(both), encoding="utf-8")
    return both


@pytest.hookimpl(trylast=True)  # below the slowest tests
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    durations = [
        (report.nodeid.partition("::")[0], report.duration)
        for reports in terminalreporter.stats.values()
        for report in reports
        if isinstance(report, pytest.TestReport)
    ]
    if file := terminalreporter.config.getoption("minutes_file"):
        durations = keep_durations(file, durations)
    rows = by_folder(durations, read_budgets())
    if not rows:
        return
    terminalreporter.section("minutes by folder, of its budget on two quiet cores")
    for row in rows:
        terminalreporter.write_line(str(row), yellow=row.over)
    total = sum(duration_s for _, duration_s in durations) / 60
    terminalreporter.write_line(f"{total:6.1f}{'':<8} all")
