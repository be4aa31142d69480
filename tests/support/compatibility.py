"""Writes docs/compatibility.md from a run's results: what each client did with the gateway.

A plugin that `tests/conftest.py` loads; `--compatibility FILE` makes it write. A test names its client and
its feature by the mark `compatibility(client, feature, result="works")`, or by `record_property` under the
same name where one test runs many cases. No cell is written by hand: a test that fails writes "fails", an
expected failure "model's limits".
"""

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

import pytest

MARK = "compatibility"
WORKS, REFUSED, LIMITS, FAILS, NOT_RUN = (
    "works",
    "refused by name",
    "model's limits",
    "**fails**",
    "not run",
)
# The worst result of a cell's tests is the cell's.
_ORDER = (FAILS, NOT_RUN, LIMITS, REFUSED, WORKS)
COMMAND = ".venv/bin/pytest tests/serve/clients --compatibility docs/compatibility.md"
HEAD = f"""# Which clients work

Written by a run of the tests that drive the clients, and by nothing else:

```
{COMMAND}
```

| cell | means |
|---|---|
| {WORKS} | the client does it against the running gateway, with base URL, key and model name alone |
| {REFUSED} | the gateway refuses it with an error that names the field |
| {LIMITS} | the gateway does it; the base that was served is not able to |
| – | no test tries it |

"""
FOOT = """
## Suites of other projects

Each runs in an environment of its own, with exact versions (`loadtests/drives/requirements-*.txt`), on a
service that it starts or that `--url`, `--key` and `--model` name:

| command | suite |
|---|---|
| `.venv/bin/python -m loadtests.drives langchain` | LangChain's standard tests for OpenAI and Anthropic |
| `.venv/bin/python -m loadtests.drives lm-eval` | lm-eval, generation by chat on a local task |
| `.venv/bin/python -m loadtests.drives vllm-bench` | vLLM's `bench serve` with its random data set |
"""
Entry = tuple[str, str, str]  # client, feature, result


def table(entries: Iterable[Entry]) -> str:
    """The table of clients and features, in the order in which they come."""
    cells: dict[tuple[str, str], str] = {}
    for client, feature, result in entries:
        known = cells.get((feature, client), WORKS)
        cells[feature, client] = min(known, result, key=_ORDER.index)
    clients = list(dict.fromkeys(client for _, client in cells))
    lines = [f"| feature | {' | '.join(clients)} |", "|---" * (len(clients) + 1) + "|"]
    for feature in dict.fromkeys(feature for feature, _ in cells):
        row = (cells.get((feature, client), "–") for client in clients)
        lines.append(f"| {feature} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def versions(packages: Mapping[str, str]) -> str:
    return "Versions: " + ", ".join(f"{name} {number}" for name, number in packages.items()) + ".\n"


class Results:
    """Gathers the entries of a run's reports, and writes the page at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[Entry] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: "pytest.CallInfo[None]") -> Iterator[None]:
        report: pytest.TestReport = yield  # type: ignore[misc,assignment] # how a wrapper gets the result
        if report.when == "call" or not report.passed:
            for mark in item.iter_markers(MARK):
                result = mark.kwargs.get("result", WORKS)
                self._entries.append((mark.args[0], mark.args[1], _result_of(report, result)))
            self._entries += (entry for name, entry in item.user_properties if name == MARK)  # type: ignore[misc]
        return report  # type: ignore[return-value]

    def pytest_sessionfinish(self) -> None:
        if self._entries:
            names = ("openai", "anthropic", "langchain-openai")
            packages = {name: version(name) for name in names} | _node_packages()
            self._path.write_text(f"{HEAD}{table(self._entries)}\n{versions(packages)}{FOOT}")


def _result_of(report: pytest.TestReport, result: str) -> str:
    if report.skipped:
        return LIMITS if hasattr(report, "wasxfail") else NOT_RUN
    return result if report.passed else FAILS


def _node_packages() -> dict[str, str]:
    import json

    folder = Path(__file__).parents[1] / "serve" / "clients"
    packages: dict[str, str] = json.loads((folder / "package.json").read_text())["dependencies"]
    return {f"{name} (npm)": number for name, number in packages.items()}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compatibility", metavar="FILE", help="write the table of clients and features there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", f"{MARK}(client, feature, result): a cell of docs/compatibility.md")
    if path := config.getoption("--compatibility"):
        config.pluginmanager.register(Results(Path(path)))
