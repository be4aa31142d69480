"""Puts all stages into one report: JSON in loadtests/results/, tables in docs/performance.md."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from loadtests.bench import tables
from loadtests.bench.machine import machine
from loadtests.bench.targets import BASE_16, MIXED_16, MIXED_64, met_targets, summary
from loadtests.peers.engine import ROOT, engine_arguments, settings
from loadtests.peers.vllm_server import flags

RESULTS = ROOT / "loadtests" / "results"
PAGE = ROOT / "docs" / "performance.md"
LIBRARIES = ("uvloop", "httptools", "uvicorn", "fastapi")


def conditions(**more: Any) -> dict[str, Any]:
    """Returns what the figures depend on: machine, versions, engine flags, and `more`."""
    described = machine()
    return described | {
        "versions": described["versions"] | {name: version(name) for name in LIBRARIES},
        "memory_gb": psutil.virtual_memory().total >> 30,
        "load_average_before": [round(value, 2) for value in psutil.getloadavg()],
        "flags": " ".join(flags(engine_arguments(settings(), ["…"]))),
        "kv_cache_gib": settings().kv_cache_gib,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **more,
    }


def build_report(stages: Mapping[str, Any], command: str, about: Mapping[str, Any]) -> dict[str, Any]:
    figures = summary(stages)
    met = met_targets(figures)
    return {"command": command, "conditions": about, "bars": figures, "met": met, "stages": stages}


def write_result(result: Mapping[str, Any], name: str) -> None:
    """Writes loadtests/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def read_result(name: str) -> dict[str, Any]:
    """Reads loadtests/results/NAME.json."""
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return result


def write_page(report: Mapping[str, Any], page: Path = PAGE) -> None:
    workloads = (
        ("tiny", BASE_16),
        ("tiny", MIXED_16),
        ("smollm2-135m", MIXED_16),
        ("smollm2-135m", MIXED_64),
    )
    parts = [
        f"{base}, {workload}:\n\n{tables.workload_table(report, base, workload)}"
        for base, workload in workloads
    ]
    tables.put(page, "conditions", tables.conditions(report))
    tables.put(page, "targets", tables.targets_table(report))
    tables.put(page, "leaves out", tables.leaves_out_list(report))
    tables.put(page, "workloads", "\n\n".join(parts))
    tables.put(page, "open loop", tables.open_table(report))
    tables.put(page, "processes", tables.process_table(report))
    tables.put(page, "generators", tables.check_table(report))
