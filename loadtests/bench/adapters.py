"""Measures what adapters cost: many on one base, cold ones, and more than there are slots.

    make bench-adapters          (about 20 minutes on two cores; alone on the machine, please)

Every engine runs in a process of its own. The engines take turns; the others are stopped (SIGSTOP)
meanwhile. Ratios are computed within a turn, medians over the turns. It prints tables and a last line of
JSON. `upstream` is the same vLLM without our plugin: its own LoRA kernels and its own loading.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.progress import track
from rich.table import Table

from loadtests.bench.machine import machine
from loadtests.bench.statistics import pair_ratios
from loadtests.synthetic import ALL, ATTENTION, publish_random
from serve.engine.adapters import cache
from serve.settings import load_settings

ROOT = Path(__file__).parents[2]
SLOTS = 16
STREAMS = 16
RANK = 8
COLD = 40
CASES: dict[str, list[int | None]] = {
    "unused": [None] * STREAMS,
    "one adapter": [0] * STREAMS,
    "16 adapters": list(range(STREAMS)),
    "4 adapters and base": [i % 4 if i % 2 else None for i in range(STREAMS)],
}
console = Console(stderr=True)


@dataclass
class EngineProcess:
    """Sends commands to a child that runs `engine_process`. The child is stopped between commands."""

    name: str
    process: "subprocess.Popen[str]"

    def execute(self, command: str, **arguments: Any) -> dict[str, Any]:
        self._signal(signal.SIGCONT)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": command} | arguments) + "\n")
        self.process.stdin.flush()
        result = self.read_result()
        self._signal(signal.SIGSTOP)
        return result

    def read_result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"engine '{self.name}' ended with status {self.process.wait()}; see its log")
        result: dict[str, Any] = json.loads(line)
        return result

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self.process.pid, number)


@contextmanager
def running_engine(
    name: str, order: dict[str, Any], log: IO[str], *, plugin: bool = True
) -> Iterator[EngineProcess]:
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"}
    if not plugin:
        environment["VLLM_PLUGINS"] = ""
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtests.bench.engine_process"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=environment,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        engine = EngineProcess(name, process)
        engine.read_result()
        engine.pause()
        yield engine
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            member.kill()
        psutil.wait_procs(family, timeout=10)
        process.wait()
        cache.sweep_directories()


def publish(base_dir: Path, adapters_dir: Path, count: int) -> list[tuple[str, str, str]]:
    """Publishes 16 + COLD adapters on every linear layer, then small ones (attention only) up to `count`."""
    versions = []
    for number in track(range(count), "making adapters", console=console):
        targets = ALL if number < SLOTS + COLD else ATTENTION
        name = f"a{number}"
        path = publish_random(
            base_dir, adapters_dir, tenant="bench", name=name, seed=number, rank=RANK, targets=targets,
            layers=None if targets is ALL else 8,
        )  # fmt: skip
        versions.append(("bench", name, path.name))
    return versions


def throughput(engines: dict[str, EngineProcess], pairs: int, tokens: int) -> dict[str, Any]:
    """Returns tok/s of each engine and case, with its ratio to `off` (no LoRA, eager) in the same turn."""
    steps = [("off", "unused"), *(("ours", case) for case in CASES)]
    if "upstream" in engines:
        steps += [("upstream", case) for case in ("unused", "one adapter", "16 adapters")]
    if "compiled" in engines:
        steps.append(("compiled", "unused"))
    samples: dict[tuple[str, str], list[float]] = {step: [] for step in steps}
    for turn in track(range(pairs + 1), "throughput", console=console):
        for name, case in steps if turn % 2 else steps[::-1]:
            result = engines[name].execute("burst", adapters=CASES[case], tokens=tokens, seed=1000 * turn)
            if turn:  # the first warms up
                samples[name, case].append(result["tokens"] / result["wall_s"])
    baseline = samples["off", "unused"]
    rows = {}
    for (name, case), rates in samples.items():
        ratios = pair_ratios(rates, baseline)
        rows[f"{name}, {case}"] = {
            "tokens_per_s": round(statistics.median(rates), 1),
            "to_off": median_ratio(rates, baseline),
            "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return rows


def median_ratio(rates: list[float], baseline: list[float]) -> float:
    return round(statistics.median(pair_ratios(rates, baseline)), 3)


def cold(engine: EngineProcess, pairs: int) -> dict[str, Any]:
    """Compares adapters that no request has named before with the same ones once they are loaded."""
    fresh = iter(range(SLOTS, SLOTS + COLD))
    each = COLD // (2 * pairs)
    samples: list[list[float]] = [[] for _ in range(6)]
    idle_warm, idle_cold, warm_gaps, cold_gaps, loaded_warm, loaded_cold = samples
    for turn in track(range(pairs), "cold adapters", console=console):
        new = [next(fresh) for _ in range(each)]
        idle_cold += engine.execute("first_tokens", adapters=new, seed=10 * turn)["ttft_s"]
        idle_warm += engine.execute("first_tokens", adapters=new, seed=500 + 10 * turn)["ttft_s"]
        new = [next(fresh) for _ in range(each)]
        for arrivals, gaps, firsts in ((new, cold_gaps, loaded_cold), (new, warm_gaps, loaded_warm)):
            result = engine.execute("neighbours", streams=8, arrivals=arrivals, every_s=1.5, seed=100 * turn)
            gaps.append(percentile(result["itl_s"], 99))
            firsts += result["ttft_s"]
    return {
        "added_ttft_ms": ms(statistics.median(c - w for c, w in zip(idle_cold, idle_warm, strict=True))),
        "warm_ttft_ms": ms(statistics.median(idle_warm)),
        "added_ttft_loaded_ms": ms(statistics.median(loaded_cold) - statistics.median(loaded_warm)),
        "warm_ttft_loaded_ms": ms(statistics.median(loaded_warm)),
        "neighbours_itl_p99_warm_ms": ms(statistics.median(warm_gaps)),
        "neighbours_itl_p99_cold_ms": ms(statistics.median(cold_gaps)),
        "neighbours_itl_ratio": median_ratio(cold_gaps, warm_gaps),
    }


def working_set(engine: EngineProcess, registered: int, pairs: int) -> dict[str, Any]:
    """Compares adapters drawn by Zipf's law from all registered ones with those drawn from only 16."""
    zipf = {"streams": 2 * SLOTS, "requests": 4 * SLOTS, "tokens": 24, "zipf": 1.0}
    many: list[float] = []
    few: list[float] = []
    worst_ttft, worst_wait, distinct = 0.0, 0.0, 0
    for turn in track(range(pairs), "working set", console=console):
        for population, rates in ((SLOTS, few), (registered, many)):
            result = engine.execute("popular", population=population, seed=100 * turn, **zipf)
            rates.append(result["tokens"] / result["wall_s"])
            worst_wait = max(worst_wait, result["worst_slot_wait_s"])
            worst_ttft = max(worst_ttft, result["worst_ttft_s"])
            distinct = max(distinct, result["distinct"])
    starved = engine.execute(
        "starve", hot=list(range(SLOTS)), cold=list(range(SLOTS, SLOTS + 8)), tokens=24, seed=7
    )
    return {
        "ratio": median_ratio(many, few),
        "warm_tokens_per_s": round(statistics.median(few), 1),
        "zipf_tokens_per_s": round(statistics.median(many), 1),
        "distinct_adapters_in_a_run": distinct,
        "worst_ttft_s": round(worst_ttft, 2),
        "worst_slot_wait_s": round(max(worst_wait, starved["worst_slot_wait_s"]), 2),
        "cold_ttft_beside_hot_s": [round(t, 2) for t in starved["cold_ttft_s"]],
    }


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def ms(seconds: float) -> float:
    return round(seconds * 1000, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--registered", type=int, default=1000)
    parser.add_argument("--no-compiled", action="store_true", help="leave out the compiled engine")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the exit ends the engines as well
    base_dir = (options.home / "bases" / options.base).resolve()
    if not base_dir.is_dir():
        parser.error(f"there is no base in {base_dir}: bespoke base import configs/bases/{options.base}.yaml")
    profile = load_settings(ROOT / "configs" / "serve" / "cpu.yaml").engine.model_dump()
    lora = profile | {"enforce_eager": True, "max_loras": SLOTS, "max_lora_rank": 16}
    with ExitStack() as stack:
        adapters_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bespoke-bench-")))
        log = stack.enter_context((adapters_dir / "engines.log").open("w"))
        adapters = publish(base_dir, adapters_dir, options.registered)
        order = {
            "base": options.base,
            "base_dir": str(base_dir),
            "adapters_dir": str(adapters_dir),
            "adapters": adapters,
        }
        kinds: dict[str, tuple[dict[str, Any], bool]] = {
            "off": (lora | {"max_loras": 0}, True),
            "ours": (lora, True),
            "upstream": (lora, False),
        }
        if not options.no_compiled:
            kinds["compiled"] = (lora | {"max_loras": 0, "enforce_eager": False}, True)
        engines = {}
        for name, (engine, plugin) in kinds.items():
            console.print(f"starting engine '{name}'")
            engines[name] = stack.enter_context(
                running_engine(name, order | {"engine": engine}, log, plugin=plugin)
            )
        # Each part is printed when it ends, so an interrupted run leaves what it has.
        rates = print_part(throughput(engines, options.pairs, options.tokens))
        cold_figures = print_part(cold(engines["ours"], options.pairs))
        set_figures = print_part(working_set(engines["ours"], options.registered, options.pairs))
    print_report(options, rates, cold_figures, set_figures)


def print_part(figures: dict[str, Any]) -> dict[str, Any]:
    console.print_json(json.dumps(figures))
    return figures


def print_report(
    options: argparse.Namespace,
    rates: dict[str, Any],
    cold_figures: dict[str, Any],
    set_figures: dict[str, Any],
) -> None:
    table = Table("engine, requests", "tok/s", "to LoRA off, eager", "lowest and highest of the turns")
    for name, row in rates.items():
        low, high = row["spread"]
        table.add_row(name, str(row["tokens_per_s"]), f"{row['to_off']:.3f}", f"{low:.3f} to {high:.3f}")
    more = Table("cold adapters, working set", "")
    for name, value in (cold_figures | set_figures).items():
        more.add_row(name.replace("_", " "), str(value))
    out = Console()
    out.print(table)
    out.print(more)
    ours = {case: rates[f"ours, {case}"]["to_off"] for case in CASES}
    compiled = rates.get("compiled, unused", {}).get("tokens_per_s")
    unused = rates["ours, unused"]["tokens_per_s"]
    figures = {
        "all_on_adapters_ratio": ours["one adapter"],
        "distinct16_ratio": ours["16 adapters"],
        "unused_ratio": ours["unused"],
        "cold_added_ttft_ms": cold_figures["added_ttft_ms"],
        "cold_neighbours_itl_ratio": cold_figures["neighbours_itl_ratio"],
        "working_set_ratio": set_figures["ratio"],
        "worst_wait_s": set_figures["worst_slot_wait_s"],
        "unused_to_compiled_ratio": round(unused / compiled, 3) if compiled else None,
        "upstream": {n.partition(", ")[2]: row["to_off"] for n, row in rates.items() if "upstream" in n},
        "throughput": rates,
        "cold": cold_figures,
        "working_set": set_figures,
        "conditions": {
            "base": options.base, "pairs": options.pairs, "streams": STREAMS, "tokens": options.tokens,
            "rank": RANK, "slots": SLOTS, "registered": options.registered, "seed": 0, **machine(),
        },
    }  # fmt: skip
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
