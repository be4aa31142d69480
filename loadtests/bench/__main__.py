"""The benchmarks of the gateway.

python -m loadtests.bench front                          all stages, and the report (about 70 minutes)
python -m loadtests.bench front --stage tiny-proxies     one stage; the report is left as it is
python -m loadtests.bench report                         the report again, from the stages that there are
python -m loadtests.bench scaling | soak | connections | cost | scrape
python -m loadtests.bench page                           the tables of docs/performance.md, from the results
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

from loadtests.bench import connections, cost, front, scaling, scrape, soak, tables
from loadtests.bench.group import GROUPS
from loadtests.bench.report import PAGE, RESULTS, conditions, load, report, save, write_page
from loadtests.peers.engine import ROOT

STAGES = ROOT / ".cache" / "bench"
BASES = {"tiny": "tiny", "smollm": "smollm2-135m"}
EVERY = [f"{base}-{group}" for base in BASES for group in GROUPS]
# The groups have the pair in them; what vLLM's own choice of processes costs is asked for by name.
DEFAULT = [stage for stage in EVERY if not stage.endswith(("-pair", "-default"))]
# As many as the most streams of a row; ours and the peers read it as `bespoke serve` does.
os.environ.setdefault("BESPOKE_ENGINE__MAX_NUM_SEQS", "64")
console = Console(stderr=True)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are ended as well
    about = conditions(seed=front.SEED, adapters=front.ADAPTERS)
    if options.command == "front":
        failed = _stages([options.stage] if options.stage else DEFAULT, options)
        if not options.stage:
            _report(DEFAULT, about)
        sys.exit(f"These stages failed: {', '.join(failed)}" if failed else 0)
    if options.command == "report":
        _report([stage for stage in EVERY if _path(stage).exists()], about)
    elif options.command == "page":
        _pages()
    else:
        _alone(options, about)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m loadtests.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    commands = parser.add_subparsers(dest="command", required=True)
    beside = commands.add_parser("front")
    beside.add_argument("--stage", choices=EVERY)
    beside.add_argument("--quick", action="store_true", help="a look, not a report")
    beside.add_argument("--pairs", type=int)
    commands.add_parser("report")
    commands.add_parser("page")
    curve = commands.add_parser("scaling")
    curve.add_argument("--passes", type=int, default=2)
    curve.add_argument("--rounds", type=int, default=3)
    steady = commands.add_parser("soak")
    steady.add_argument("--minutes", type=int, default=30)
    apart = commands.add_parser("cost")
    apart.add_argument("--rounds", type=int, default=5)
    asked = commands.add_parser("scrape")
    asked.add_argument("--scrapes", type=int, default=100)
    crowd = commands.add_parser("connections")
    crowd.add_argument("--requests", type=int, default=500)
    crowd.add_argument("--idle", type=int, default=connections.IDLE)
    crowd.add_argument("--slow", type=int, default=connections.SLOW)
    return parser.parse_args()


def _stages(names: list[str], options: argparse.Namespace) -> list[str]:
    """Each stage is kept as it ends: a run that is broken off has not been for nothing."""
    failed = []
    for name in names:
        base, _, group = name.partition("-")
        plan = front.Plan.of(quick=options.quick, pairs=options.pairs)
        _path(name).unlink(missing_ok=True)
        try:
            told = front.measure(options.home, BASES[base], GROUPS[group], plan)
        except Exception:
            console.print(f"stage {name} failed:\n{traceback.format_exc()}")
            failed.append(name)
            continue
        _path(name).parent.mkdir(parents=True, exist_ok=True)
        _path(name).write_text(json.dumps(told, indent=1) + "\n")
    return failed


def _report(names: list[str], about: dict[str, Any]) -> None:
    stages = {name: json.loads(_path(name).read_text()) for name in names if _path(name).exists()}
    told = report(stages, "make bench", about)
    save(told, "bench")
    console.print(Markdown(tables.bars_table(told)))
    console.print(told["met"])
    sys.stdout.write(json.dumps(told["bars"]) + "\n")


def _alone(options: argparse.Namespace, about: dict[str, Any]) -> None:
    """What has one server and a result file of its own."""
    if options.command == "scaling":
        told = scaling.measure(options.home, "tiny", passes=options.passes, rounds=options.rounds)
        text = scaling.table(told)
    elif options.command == "soak":
        told = soak.measure(options.home, "tiny", minutes=options.minutes, seed=front.SEED)
        text = soak.table(told)
    elif options.command == "cost":
        told = cost.measure(options.home, "tiny", rounds=options.rounds)
        text = cost.table(told)
    elif options.command == "scrape":
        told = scrape.measure(options.home, "tiny", scrapes=options.scrapes)
        text = scrape.table(told)
    else:
        told = connections.measure(
            options.home, "tiny", requests=options.requests, idle=options.idle, slow=options.slow
        )
        text = connections.table(told)
    save({"conditions": about} | told, options.command)
    console.print(Markdown(text))
    sys.stdout.write(json.dumps(told) + "\n")


def _pages() -> None:
    write_page(load("bench"))
    for one in (scaling, soak, connections, cost, scrape):
        name = one.__name__.rpartition(".")[2]
        if (RESULTS / f"{name}.json").exists():
            tables.put(PAGE, name, one.table(load(name)))


def _path(stage: str) -> Path:
    return STAGES / f"{stage}.json"


if __name__ == "__main__":
    main()
