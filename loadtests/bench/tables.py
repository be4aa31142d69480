"""Makes the tables of docs/performance.md from the bench's JSON.

Each table stands between two markers; the text around them is written by hand.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.bench.bespoke_server import BESPOKE
from loadtests.bench.targets import (
    AT_LEAST,
    AT_MOST,
    MIXED_16,
    RATIOS,
    ratio_spread,
    server_names,
    server_summary,
)
from loadtests.peers.vllm_server import BARE

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
    """Replaces the text between `<!-- NAME -->` and `<!-- /NAME -->`. Raises ValueError without them."""
    between = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", re.DOTALL)
    page, count = between.subn(lambda marks: f"{marks[1]}{text}\n{marks[2]}", path.read_text())
    if count != 1:
        raise ValueError(f"{path.name} has no place for '{name}'.")
    path.write_text(page)


def targets_table(report: Mapping[str, Any]) -> str:
    """Has a row for each figure and a column for each server: median, lowest and highest pair."""
    stages = report["stages"]
    names = [name for name in server_names(stages) if name != BARE]
    summaries = {name: server_summary(name, stages) for name in names}
    rows = []
    for figure, label in LABELS.items():
        cells = [label, _target(figure)]
        for name in names:
            value, cell = summaries[name][figure], "–"
            if value is not None:
                cell = f"{value:.3f}" if figure in RATIOS else f"{value:.1f}"
                within = ratio_spread(name, figure, stages) if figure in RATIOS else None
                cell += f" ({within['low']:.2f}–{within['high']:.2f})" if within else ""
            cells.append(f"**{cell}**" if name == BESPOKE else cell)
        rows.append(cells)
    return markdown(["to a bare vLLM in the same pair", "target", *names], rows)


def workload_table(report: Mapping[str, Any], base: str, workload: str) -> str:
    """Has absolute figures. A server's come from the first stage that it was in."""
    rows = []
    for name in server_names(report["stages"]):
        for stage in report["stages"].values():
            closed = stage["closed"] if stage["base"] == base else {}
            by_server = closed.get(workload, {}).get("servers", {})
            if name in by_server:
                rows.append([name, *_workload_cells(by_server[name])])
                break
    head = ["", "tok/s", "requests/s", "goodput/s", "TTFT p50 / p90 / p99 ms", "ITL p50 / p90 / p99 ms",
            "CPU s per 1,000 tokens", "of it front end"]  # fmt: skip
    return markdown(head, rows)


def open_table(report: Mapping[str, Any]) -> str:
    rows = []
    for name in server_names(report["stages"]):
        stage = _first(report, name, "open")
        if stage is not None:
            row = stage["open"]["servers"][name]
            rows.append([name, f"{stage['open']['arrivals_per_s']:.1f}", f"{row['goodput_per_s']:.2f}",
                         _quantiles(row, "ttft"), _quantiles(row, "itl"), str(row["failed"])])  # fmt: skip
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
    """Has CPU and memory by process, from each server's first stage with the tiny model."""
    rows = []
    for name in server_names(report["stages"]):
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
    for name in server_names(report["stages"]):
        stage = _first(report, name, "check")
        if stage is not None:
            check = stage["check"][name]
            ours, theirs = check["ours"], check["vllm_benchmarks"]
            rows.append([name, f"{ours['prompt_tokens']} / {ours['completion_tokens']}",
                         f"{theirs['prompt_tokens']} / {theirs['completion_tokens']}",
                         "yes" if check["agree"] else "**no**"])  # fmt: skip
    return markdown(["prompt / completion tokens", "our generator", "vllm.benchmarks.serve", "agree"], rows)


def leaves_out_list(report: Mapping[str, Any]) -> str:
    texts = {name: text for stage in report["stages"].values() for name, text in stage["leaves_out"].items()}
    return "\n".join(f"- `{name}`: {text}" for name, text in texts.items())


def conditions(report: Mapping[str, Any]) -> str:
    about = report["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (
        f"`{report['command']}`, {about['date']}: {about['cpu']}, {about['cores']} cores "
        f"({', '.join(about['vectors'])}), {about['memory_gb']} GB, Python {about['python']}, {versions}. "
        f"Every server's engine: `{about['flags']}`, {about['kv_cache_gib']} GiB of KV cache. "
        f"{about['adapters']} random adapters of rank 8, seed {about['seed']}."
    )


def _first(report: Mapping[str, Any], name: str, part: str) -> Mapping[str, Any] | None:
    stages = (stage for stage in report["stages"].values() if name in stage["idle"] and part in stage)
    return next(stages, None)


def _workload_cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"{row['tokens_per_s']:.0f}",
        f"{row['requests_per_s']:.2f}",
        f"{row['goodput_per_s']:.2f}",
        _quantiles(row, "ttft"),
        _quantiles(row, "itl"),
        f"{row['cpu_s_per_1k']:.2f}",
        f"{row['front_cpu_s_per_1k']:.3f}",
    ]


def _quantiles(row: Mapping[str, Any], name: str) -> str:
    return " / ".join(f"{row[f'{name}_p{p}_ms']:.0f}" for p in (50, 90, 99))


def _target(figure: str) -> str:
    if figure in AT_LEAST:
        return f"≥ {AT_LEAST[figure]}"
    return f"≤ {AT_MOST[figure]}" if figure in AT_MOST else ""
