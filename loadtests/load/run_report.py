"""Builds the report of a run and prints it: JSON for machines, tables for people."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.bench.machine import machine
from loadtests.load.bill_comparison import Verdict
from loadtests.load.measurements import Measurements
from loadtests.load.request_record import Outcome
from loadtests.load.service_under_test import ServiceUnderTest

if TYPE_CHECKING:
    from loadtests.load.scenarios import Scenario

DIFFERENCES_SHOWN = 20
WIDTH = 110  # of a log file
COLUMNS = (">count", ">mean ms", ">p50", ">p90", ">p99", ">most", ">left", ">refused", ">failed")
TIME_PARTS = ("mean_ms", "p50_ms", "p90_ms", "p99_ms", "most_ms")
TIMES = (("request", "request"), ("TTFT", "ttft"), ("ITL", "itl"))


class ApiError(Exception):
    """Shows only an error's code, because Locust groups failures by their text."""

    def __repr__(self) -> str:
        return str(self)


def build_report(
    scenario: "Scenario",
    service: ServiceUnderTest,
    measurements: Measurements,
    verdict: Verdict,
    elapsed_s: float,
) -> dict[str, Any]:
    complete = measurements.count(Outcome.COMPLETE)
    prompt_tokens = sum(record.tokens.prompt for record in measurements.records if record.tokens)
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": dict(service.description),
        "machine": machine(),
        "users": max((part.users for part in measurements.slices), default=0),
        "elapsed_s": round(elapsed_s, 1),
        "requests_per_s": round(complete / elapsed_s, 2),
        "tokens_per_s": round(measurements.tokens / elapsed_s, 1),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": measurements.tokens,
        **{outcome.value: measurements.count(outcome) for outcome in Outcome},
        "refusals": measurements.codes(Outcome.REFUSED),
        "failures": measurements.codes(Outcome.FAILED),
        "rows": {name: row.summary() for name, row in sorted(measurements.rows.items())},
        "course": [part.summary() for part in measurements.timeline()],
        "findings": scenario.findings(measurements),
        "reconciliation": {
            "agrees": verdict.agrees,
            "checks": verdict.checks,
            "differences": [
                {
                    "who": mismatch.subject,
                    "what": mismatch.quantity,
                    "seen": mismatch.expected,
                    "billed": mismatch.billed,
                }
                for mismatch in verdict.mismatches
            ],
            "notes": verdict.notes,
        },
    }


def print_report(report: dict[str, Any]) -> None:
    console = Console()
    if console.width < WIDTH and not console.is_terminal:
        console = Console(width=WIDTH)
    console.rule(f"[bold]{report['scenario']}[/]: {report['about']}", align="left")
    console.print(_rows(report))
    console.print(_timeline(report))
    for name, value in report["findings"].items():
        console.print(f"{name}: [bold]{value}[/]", highlight=False)
    counts = ", ".join(f"{report[outcome.value]} {outcome.value}" for outcome in Outcome)
    rates = f"{report['tokens_per_s']} tok/s, {report['requests_per_s']} requests/s"
    console.print(f"{rates} over {report['elapsed_s']} s; {counts}")
    for what in ("refusals", "failures"):
        if report[what]:
            console.print(
                f"{what}: " + ", ".join(f"{count} × {code}" for code, count in report[what].items())
            )
    _verdict(report["reconciliation"], console)


def _rows(report: dict[str, Any]) -> Table:
    table = _table("row", "what", *COLUMNS)
    for name, row in report["rows"].items():
        others = [str(row[key]) for key in ("left", "refused", "failed")]
        for what, key in TIMES:
            times = row[key]
            if times["count"]:
                shown = (_ms(times[part]) for part in TIME_PARTS)
                table.add_row(name, what, f"{times['count']:,}", *shown, *others)
                name, others = "", []
        if others:  # no request was answered: shows the counts alone
            table.add_row(name, "request", "0", *[""] * len(TIME_PARTS), *others)
    return table


def _timeline(report: dict[str, Any]) -> Table:
    """Shows what came in each part of the run."""
    table = _table(
        *("s", ">users", ">tok/s", ">complete", ">left", ">refused", ">failed"),
        *(">TTFT p50", ">p99", ">ITL p50", ">p99", ">service MB"),
    )
    for part in report["course"]:
        times = (part[key][quantile] for key in ("ttft", "itl") for quantile in ("p50_ms", "p99_ms"))
        table.add_row(
            f"{part['start_s']:.0f}-{part['end_s']:.0f}",
            str(part["users"]),
            f"{part['tokens_per_s']:.0f}",
            *(str(part[key]) for key in ("complete", "left", "refused", "failed")),
            *(_ms(ms) for ms in times),
            "" if part["memory_mb"] is None else f"{part['memory_mb']:,}",
        )
    return table


def _table(*columns: str) -> Table:
    """Makes a table. Columns named with '>' are numbers: aligned to the right and never cut."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    return table


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _verdict(reconciliation: dict[str, Any], console: Console) -> None:
    for check, compared in reconciliation["checks"].items():
        console.print(f"compared: {check} ({compared:,})", highlight=False)
    for note in reconciliation["notes"]:
        console.print(f"note: {note}", highlight=False, style="yellow")
    if reconciliation["agrees"]:
        console.print("clients, bill and engines agree to the token", style="green")
        return
    table = _table("who", "what differs", ">should be", ">billed")
    for mismatch in reconciliation["differences"][:DIFFERENCES_SHOWN]:
        table.add_row(mismatch["who"], mismatch["what"], mismatch["seen"], mismatch["billed"])
    console.print(table)
    if (more := len(reconciliation["differences"]) - DIFFERENCES_SHOWN) > 0:
        console.print(f"and {more} more, in the JSON")
    console.print("clients, bill and engines do NOT agree", style="bold red")
