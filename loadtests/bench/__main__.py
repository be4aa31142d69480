"""Runs the benchmarks of the gateway from the command line.

python -m loadtests.bench overhead                        all stages and the report (about 70 minutes)
python -m loadtests.bench overhead --stage tiny-proxies   one stage; the report stays as it is
python -m loadtests.bench report                          the report again, from the stages on disk
python -m loadtests.bench scaling | soak | connections | cost | scrape
python -m loadtests.bench page                            the tables of docs/performance.md, from the results
"""

import argparse
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from loadtests.bench import connections, cost, overhead, scaling, scrape, soak, tables
from loadtests.bench.results import (
    PAGE,
    RESULTS,
    build_report,
    conditions,
    read_result,
    write_page,
    write_result,
)
from loadtests.bench.servers import GROUPS
from loadtests.peers.engine import ROOT

STAGES = ROOT / ".cache" / "bench"
BASES = {"tiny": "tiny", "smollm": "smollm2-135m"}
ALL_STAGES = [f"{base}-{group}" for base in BASES for group in GROUPS]
# Every group contains the pair. The stages with vLLM's own choice of processes run only when named.
DEFAULT_STAGES = [stage for stage in ALL_STAGES if not stage.endswith(("-pair", "-default"))]
# The largest number of streams in a row of the report. Our server and the peers read it like `bespoke serve`.
os.environ.setdefault("BESPOKE_ENGINE__MAX_NUM_SEQS", "64")
console = Console(stderr=True)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the exit ends the servers as well
    about = conditions(seed=overhead.SEED, adapters=overhead.ADAPTERS)
    if options.command == "overhead":
        failed = _run_stages([options.stage] if options.stage else DEFAULT_STAGES, options)
        if not options.stage:
            _report(DEFAULT_STAGES, about)
        sys.exit(f"These stages failed: {', '.join(failed)}" if failed else 0)
    if options.command == "report":
        _report([stage for stage in ALL_STAGES if _path(stage).exists()], about)
    elif options.command == "page":
        _write_pages()
    else:
        _run_single_server(options, about)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    commands = parser.add_subparsers(dest="command", required=True)
    over = commands.add_parser("overhead", aliases=["front"])  # `front` is its old name
    over.set_defaults(command="overhead")
    over.add_argument("--stage", choices=ALL_STAGES)
    over.add_argument("--quick", action="store_true", help="a look, not a report")
    over.add_argument("--pairs", type=int)
    commands.add_parser("report")
    commands.add_parser("page")
    scale = commands.add_parser("scaling")
    scale.add_argument("--passes", type=int, default=2)
    scale.add_argument("--rounds", type=int, default=3)
    long = commands.add_parser("soak")
    long.add_argument("--minutes", type=int, default=30)
    per_token = commands.add_parser("cost")
    per_token.add_argument("--rounds", type=int, default=5)
    metrics = commands.add_parser("scrape")
    metrics.add_argument("--scrapes", type=int, default=100)
    clients = commands.add_parser("connections")
    clients.add_argument("--requests", type=int, default=500)
    clients.add_argument("--idle", type=int, default=connections.IDLE)
    clients.add_argument("--slow", type=int, default=connections.SLOW)
    return parser.parse_args()


def _run_stages(names: list[str], options: argparse.Namespace) -> list[str]:
    """Runs the stages and returns those that failed.

    Each result is saved when its stage ends, so an interrupted run keeps what it has.
    """
    failed = []
    for name in names:
        base, _, group = name.partition("-")
        size = overhead.StageSize.of(quick=options.quick, pairs=options.pairs)
        _path(name).unlink(missing_ok=True)
        try:
            result = overhead.measure(options.home, BASES[base], GROUPS[group], size)
        except Exception:
            console.print(f"stage {name} failed:\n{traceback.format_exc()}", markup=False)
            failed.append(name)
            continue
        _path(name).parent.mkdir(parents=True, exist_ok=True)
        _path(name).write_text(json.dumps(result, indent=1) + "\n")
    return failed


def _report(names: list[str], about: dict[str, Any]) -> None:
    stages = {name: json.loads(_path(name).read_text()) for name in names if _path(name).exists()}
    result = build_report(stages, "make bench", about)
    write_result(result, "bench")
    console.print(Markdown(tables.targets_table(result)))
    console.print(result["met"])
    sys.stdout.write(json.dumps(result["bars"]) + "\n")


def _run_single_server(options: argparse.Namespace, about: dict[str, Any]) -> None:
    """Runs a benchmark that has a result file of its own, and saves it."""
    if options.command == "scaling":
        result = scaling.measure(options.home, "tiny", passes=options.passes, rounds=options.rounds)
        text = scaling.table(result)
    elif options.command == "soak":
        result = soak.measure(options.home, "tiny", minutes=options.minutes, seed=overhead.SEED)
        text = soak.table(result)
    elif options.command == "cost":
        result = cost.measure(options.home, "tiny", rounds=options.rounds)
        text = cost.table(result)
    elif options.command == "scrape":
        result = scrape.measure(options.home, "tiny", scrapes=options.scrapes)
        text = scrape.table(result)
    else:
        result = connections.measure(
            options.home, "tiny", requests=options.requests, idle=options.idle, slow=options.slow
        )
        text = connections.table(result)
    write_result({"conditions": about} | result, options.command)
    console.print(Markdown(text))
    sys.stdout.write(json.dumps(result) + "\n")


def _write_pages() -> None:
    write_page(read_result("bench"))
    for bench in (scaling, soak, connections, cost, scrape):
        name = bench.__name__.rpartition(".")[2]
        if (RESULTS / f"{name}.json").exists():
            tables.put(PAGE, name, bench.table(read_result(name)))


def _path(stage: str) -> Path:
    return STAGES / f"{stage}.json"


if __name__ == "__main__":
    main()
