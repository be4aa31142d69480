"""The tables of docs/performance.md, from the bench's JSON; between markers, so that the text stays ours."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.bench.bars import AT_LEAST, AT_MOST, MIXED_16, RATIOS, figures_of, ratio_spread, servers
from loadtests.bench.group import BARE
from loadtests.bench.ours import NAME

LABELS = {
    "ratio_16": "SmolLM2-135M, 16 streams, mixed",
    "ratio_64": "SmolLM2-135M, 64 streams, mixed",
    "tiny_ratio": "tiny, 16 streams, base",
    "tiny_mixed_ratio": "tiny, 16 streams, mixed",
    "front_cpu_ratio": "front-end CPU per token",
    "added_ttft_p50_ms": "added TTFT p50, ms",
    "added_ttft_p99_ms": "added TTFT p99, ms",
    "idle_cpu_pct": "idle, % of one core",
}
Rows = list[list[str]]


def markdown(head: Sequence[str], rows: Rows) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def put(path: Path, name: str, text: str) -> None:
    """Replace what is between `<!-- NAME -->` and `<!-- /NAME -->`. Raises ValueError without them."""
    between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    page, found = between.subn(lambda marks: f"{marks[1]}{text}\n{marks[2]}", path.read_text())
    if found != 1:
        raise ValueError(f"{path.name} has no place for '{name}'.")
    path.write_text(page)


def bars_table(report: Mapping[str, Any]) -> str:
    """One row a bar, one column a server; medians with the lowest and the highest pair."""
    stages = report["stages"]
    names = [name for name in servers(stages) if name != BARE]
    told = {name: figures_of(name, stages) for name in names}
    rows = []
    for bar, label in LABELS.items():
        cells = [label, _bar(bar)]
        for name in names:
            value, cell = told[name][bar], "–"
            if value is not None:
                cell = f"{value:.3f}" if bar in RATIOS else f"{value:.1f}"
                within = ratio_spread(name, bar, stages) if bar in RATIOS else None
                cell += f" ({within['low']:.2f}–{within['high']:.2f})" if within else ""
            cells.append(f"**{cell}**" if name == NAME else cell)
        rows.append(cells)
    return markdown(["to a bare vLLM in the same pair", "bar", *names], rows)


def work_table(report: Mapping[str, Any], base: str, work: str) -> str:
    """Absolute figures: a server's are of the first stage that had it, whatever else ran beside it."""
    rows = []
    for name in servers(report["stages"]):
        for stage in report["stages"].values():
            told = stage["closed"].get(work, {}).get("servers", {}) if stage["base"] == base else {}
            if name in told:
                rows.append([name, *_work_cells(told[name])])
                break
    head = ["", "tok/s", "requests/s", "goodput/s", "TTFT p50 / p90 / p99 ms", "ITL p50 / p90 / p99 ms",
            "CPU s per 1,000 tokens", "of it front end"]  # fmt: skip
    return markdown(head, rows)


def open_table(report: Mapping[str, Any]) -> str:
    rows = []
    for name in servers(report["stages"]):
        stage = _first(report, name, "open")
        if stage is not None:
            one = stage["open"]["servers"][name]
            rows.append([name, f"{stage['open']['arrivals_per_s']:.1f}", f"{one['goodput_per_s']:.2f}",
                         _three(one, "ttft"), _three(one, "itl"), str(one["failed"])])  # fmt: skip
    return markdown(
        [
            "tiny, mixed, Poisson",
            "arrivals/s",
            "goodput/s",
            "TTFT p50 / p90 / p99 ms",
            "ITL p50 / p90 / p99 ms",
            "failed",
        ],
        rows,
    )


def process_table(report: Mapping[str, Any]) -> str:
    """CPU and memory by process, of each server's first stage with the tiny model."""
    rows = []
    for name in servers(report["stages"]):
        stage = _first(report, name, "latency")
        if stage is None:
            continue
        cpu, idle = (
            stage["closed"][MIXED_16]["servers"][name]["cpu_s_per_1k_by_role"],
            stage["idle"][name]["by_role"],
        )
        for role, memory in stage["memory_mb"][name].items():
            if memory >= 20 or cpu.get(role, 0.0) >= 0.001:
                rows.append(
                    [name, role, f"{cpu.get(role, 0.0):.3f}", f"{idle.get(role, 0.0):.1f}", str(memory)]
                )
    return markdown(["", "process", "CPU s per 1,000 tokens", "idle, % of one core", "memory MB (PSS)"], rows)


def check_table(report: Mapping[str, Any]) -> str:
    rows = []
    for name in servers(report["stages"]):
        stage = _first(report, name, "check")
        if stage is not None:
            one = stage["check"][name]
            ours, theirs = one["ours"], one["vllm_benchmarks"]
            rows.append([name, f"{ours['prompt_tokens']} / {ours['completion_tokens']}",
                         f"{theirs['prompt_tokens']} / {theirs['completion_tokens']}",
                         "yes" if one["agree"] else "**no**"])  # fmt: skip
    return markdown(["prompt / completion tokens", "our generator", "vllm.benchmarks.serve", "agree"], rows)


def leaves_out_list(report: Mapping[str, Any]) -> str:
    said = {name: text for stage in report["stages"].values() for name, text in stage["leaves_out"].items()}
    return "\n".join(f"- `{name}`: {text}" for name, text in said.items())


def conditions(report: Mapping[str, Any]) -> str:
    at = report["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    return (
        f"`{report['command']}`, {at['date']}: {at['cpu']}, {at['cores']} cores "
        f"({', '.join(at['vectors'])}), {at['memory_gb']} GB, Python {at['python']}, {versions}. "
        f"Every server's engine: `{at['flags']}`, {at['kv_cache_gib']} GiB of KV cache. "
        f"{at['adapters']} random adapters of rank 8, seed {at['seed']}."
    )


def _first(report: Mapping[str, Any], name: str, part: str) -> Mapping[str, Any] | None:
    stages = (stage for stage in report["stages"].values() if name in stage["idle"] and part in stage)
    return next(stages, None)


def _work_cells(one: Mapping[str, Any]) -> list[str]:
    return [
        f"{one['tokens_per_s']:.0f}",
        f"{one['requests_per_s']:.2f}",
        f"{one['goodput_per_s']:.2f}",
        _three(one, "ttft"),
        _three(one, "itl"),
        f"{one['cpu_s_per_1k']:.2f}",
        f"{one['front_cpu_s_per_1k']:.3f}",
    ]


def _three(one: Mapping[str, Any], name: str) -> str:
    return " / ".join(f"{one[f'{name}_p{p}_ms']:.0f}" for p in (50, 90, 99))


def _bar(bar: str) -> str:
    if bar in AT_LEAST:
        return f"≥ {AT_LEAST[bar]}"
    return f"≤ {AT_MOST[bar]}" if bar in AT_MOST else ""
