"""The page of clients says what a run has found, and nothing that it has not."""

from pathlib import Path

import pytest

from tests.support.compatibility import FAILS, LIMITS, REFUSED, WORKS, table

pytest_plugins = ["pytester"]

TESTS = """
import pytest

pytestmark = pytest.mark.compatibility("curl", "everything")

@pytest.mark.compatibility("curl", "chat")
def test_works(): pass

@pytest.mark.compatibility("curl", "images", result="refused by name")
def test_refused(): pass

@pytest.mark.compatibility("curl", "tools")
def test_fails(): assert False

@pytest.mark.compatibility("curl", "poems")
@pytest.mark.xfail
def test_limits(): assert False

@pytest.mark.compatibility("curl", "setup")
def test_setup(missing_fixture): pass

def test_cases(record_property):
    record_property("compatibility", ("node", "chat", "works"))
"""


def test_a_run_writes_each_tests_own_result(pytester: pytest.Pytester, tmp_path: Path) -> None:
    pytester.makepyfile(TESTS)
    page = tmp_path / "page.md"
    pytester.runpytest("-p", "tests.support.compatibility", "--compatibility", str(page))
    rows = dict(line.strip("| ").split(" | ", 1) for line in page.read_text().splitlines() if "| " in line)
    assert rows["chat"] == f"{WORKS} | {WORKS}"
    assert rows["images"] == f"{REFUSED} | –"
    assert rows["poems"] == f"{LIMITS} | –"
    assert {rows[name] for name in ("tools", "setup", "everything")} == {f"{FAILS} | –"}


def test_a_cell_of_several_tests_is_the_worst_of_them() -> None:
    entries = [("a", "chat", WORKS), ("a", "chat", LIMITS), ("a", "chat", WORKS), ("b", "tools", REFUSED)]
    assert table(entries).splitlines()[2:] == [f"| chat | {LIMITS} | – |", f"| tools | – | {REFUSED} |"]
