"""A run's report: JSON for machines, tables for people."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from loadtests.bench.machine import machine
from loadtests.load.exchange import Outcome
from loadtests.load.reconcile import Verdict
from loadtests.load.tally import Tally
from loadtests.load.target import Target

if TYPE_CHECKING:
    from loadtests.load.scenarios import Scenario

DIFFERENCES_SHOWN = 20
WIDTH = 110  # of a log file
COLUMNS = (">count", ">mean ms", ">p50", ">p90", ">p99", ">most", ">left", ">refused", ">failed")
TIME_PARTS = ("mean_ms", "p50_ms", "p90_ms", "p99_ms", "most_ms")
TIMES = (("request", "request"), ("TTFT", "ttft"), ("ITL", "itl"))


class ApiError(Exception):
    """An error's code: what Locust groups failures by."""

    def __repr__(self) -> str:
        return str(self)


def make(
    scenario: "Scenario", target: Target, tally: Tally, verdict: Verdict, elapsed_s: float
) -> dict[str, Any]:
    complete, prompt = (
        tally.count(Outcome.COMPLETE),
        sum(e.tokens.prompt for e in tally.exchanges if e.tokens),
    )
    return {
        "scenario": scenario.name,
        "about": scenario.about,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "target": dict(target.described),
        "machine": machine(),
        "users": max((one.users for one in tally.slices), default=0),
        "elapsed_s": round(elapsed_s, 1),
        "requests_per_s": round(complete / elapsed_s, 2),
        "tokens_per_s": round(tally.tokens / elapsed_s, 1),
        "prompt_tokens": prompt,
        "completion_tokens": tally.tokens,
        **{outcome.value: tally.count(outcome) for outcome in Outcome},
        "refusals": tally.codes(Outcome.REFUSED),
        "failures": tally.codes(Outcome.FAILED),
        "rows": {name: row.figures() for name, row in sorted(tally.rows.items())},
        "course": [one.figures() for one in tally.course()],
        "findings": scenario.findings(tally),
        "reconciliation": {
            "agrees": verdict.agrees,
            "checks": verdict.checks,
            "differences": [
                {"who": d.who, "what": d.what, "seen": d.seen, "billed": d.billed}
                for d in verdict.differences
            ],
            "notes": verdict.notes,
        },
    }


def show(made: dict[str, Any]) -> None:
    console = Console()
    if console.width < WIDTH and not console.is_terminal:
        console = Console(width=WIDTH)
    console.rule(f"[bold]{made['scenario']}[/]: {made['about']}", align="left")
    console.print(_rows(made))
    console.print(_course(made))
    for name, value in made["findings"].items():
        console.print(f"{name}: [bold]{value}[/]", highlight=False)
    counts = ", ".join(f"{made[outcome.value]} {outcome.value}" for outcome in Outcome)
    rates = f"{made['tokens_per_s']} tok/s, {made['requests_per_s']} requests/s"
    console.print(f"{rates} over {made['elapsed_s']} s; {counts}")
    for what in ("refusals", "failures"):
        if made[what]:
            console.print(f"{what}: " + ", ".join(f"{count} × {code}" for code, count in made[what].items()))
    _verdict(made["reconciliation"], console)


def _rows(made: dict[str, Any]) -> Table:
    table = _table("row", "what", *COLUMNS)
    for name, row in made["rows"].items():
        others = [str(row[key]) for key in ("left", "refused", "failed")]
        for what, key in TIMES:
            times = row[key]
            if times["count"]:
                shown = (_ms(times[part]) for part in TIME_PARTS)
                table.add_row(name, what, f"{times['count']:,}", *shown, *others)
                name, others = "", []
        if others:  # nothing was answered: the counts of what happened instead
            table.add_row(name, "request", "0", *[""] * len(TIME_PARTS), *others)
    return table


def _course(made: dict[str, Any]) -> Table:
    """What came in the course of time."""
    table = _table(
        *("s", ">users", ">tok/s", ">complete", ">left", ">refused", ">failed"),
        *(">TTFT p50", ">p99", ">ITL p50", ">p99", ">service MB"),
    )
    for one in made["course"]:
        times = (one[key][part] for key in ("ttft", "itl") for part in ("p50_ms", "p99_ms"))
        table.add_row(
            f"{one['start_s']:.0f}-{one['end_s']:.0f}",
            str(one["users"]),
            f"{one['tokens_per_s']:.0f}",
            *(str(one[key]) for key in ("complete", "left", "refused", "failed")),
            *(_ms(ms) for ms in times),
            "" if one["memory_mb"] is None else f"{one['memory_mb']:,}",
        )
    return table


def _table(*columns: str) -> Table:
    """Columns that start with '>' are numbers. Nothing is cut: half a number is a wrong one."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.lstrip(">"), justify=justify, no_wrap=True)
    return table


def _ms(ms: float | None) -> str:
    return "" if ms is None else f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _verdict(said: dict[str, Any], console: Console) -> None:
    for check, compared in said["checks"].items():
        console.print(f"compared: {check} ({compared:,})", highlight=False)
    for note in said["notes"]:
        console.print(f"note: {note}", highlight=False, style="yellow")
    if said["agrees"]:
        console.print("clients, bill and engines agree to the token", style="green")
        return
    table = _table("who", "what differs", ">should be", ">billed")
    for one in said["differences"][:DIFFERENCES_SHOWN]:
        table.add_row(one["who"], one["what"], one["seen"], one["billed"])
    console.print(table)
    if (more := len(said["differences"]) - DIFFERENCES_SHOWN) > 0:
        console.print(f"and {more} more, in the JSON")
    console.print("clients, bill and engines do NOT agree", style="bold red")
