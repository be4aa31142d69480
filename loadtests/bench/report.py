"""All stages as one report: the JSON under loadtests/results/, the tables in docs/performance.md."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from loadtests.bench import tables
from loadtests.bench.bars import BASE_16, MIXED_16, MIXED_64, bars, met
from loadtests.bench.machine import machine
from loadtests.peers.engine import ROOT, engine_arguments, settings
from loadtests.peers.vllm_server import flags

RESULTS = ROOT / "loadtests" / "results"
PAGE = ROOT / "docs" / "performance.md"
LIBRARIES = ("uvloop", "httptools", "uvicorn", "fastapi")


def conditions(**more: Any) -> dict[str, Any]:
    """What the figures depend on."""
    found = machine()
    return found | {
        "versions": found["versions"] | {name: version(name) for name in LIBRARIES},
        "memory_gb": psutil.virtual_memory().total >> 30,
        "load_average_before": [round(value, 2) for value in psutil.getloadavg()],
        "flags": " ".join(flags(engine_arguments(settings(), ["…"]))),
        "kv_cache_gib": settings().kv_cache_gib,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        **more,
    }


def report(stages: Mapping[str, Any], command: str, about: Mapping[str, Any]) -> dict[str, Any]:
    told = bars(stages)
    return {"command": command, "conditions": about, "bars": told, "met": met(told), "stages": stages}


def save(told: Mapping[str, Any], name: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


def load(name: str) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return told


def write_page(told: Mapping[str, Any], page: Path = PAGE) -> None:
    works = (("tiny", BASE_16), ("tiny", MIXED_16), ("smollm2-135m", MIXED_16), ("smollm2-135m", MIXED_64))
    parts = [f"{base}, {work}:\n\n{tables.work_table(told, base, work)}" for base, work in works]
    tables.put(page, "conditions", tables.conditions(told))
    tables.put(page, "bars", tables.bars_table(told))
    tables.put(page, "leaves out", tables.leaves_out_list(told))
    tables.put(page, "works", "\n\n".join(parts))
    tables.put(page, "open loop", tables.open_table(told))
    tables.put(page, "processes", tables.process_table(told))
    tables.put(page, "generators", tables.check_table(told))
