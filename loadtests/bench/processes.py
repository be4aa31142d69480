"""Reads CPU and memory of a server's processes, by the role of each process."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from loadtests.peers.process import family

REPLICA = re.compile(r"ServeReplica:[^:]+:([^:. ]+)")
# A mark in a process's title or command line → its role. ENGINE computes; FRONT_END is around the engine.
ENGINE = {"VLLM::EngineCore": "engine core", "VLLM::Worker": "worker"}
HOUSEKEEPING = {
    "ray::ServeController": "Serve controller",
    "gcs_server": "GCS",
    "raylet": "raylet",
    "ray/dashboard": "Ray's agents",
    "runtime_env": "Ray's agents",
    "ray/_private": "Ray's monitors",
    "ray::DashboardAgent": "Ray's agents",
    "ray::RuntimeEnvAgent": "Ray's agents",
    "ray::IDLE": "idle Ray workers",
    "resource_tracker": "resource tracker",
    "serve.cli": "bespoke serve",
    "ray_llm_process": "ray.serve.llm's driver",
    "steward": "steward",
}
FRONT_END = {
    "ray::ProxyActor": "Ray's proxy",
    "ray::HAProxyManager": "HAProxy's manager",
    "haproxy": "HAProxy",
    "openai.api_server": "API server",
    "litellm": "LiteLLM",
    "vllm-router": "vllm-router",
    "vllm::router": "vllm-router",
}
Seconds = dict[str, float]


def role(command: str) -> str:
    """Returns a process's role by its command line, or by the title that it gave itself."""
    if match := REPLICA.search(command):
        replica = match[1]
        return f"engine front ({replica})" if replica.startswith("engine-") else replica
    for known in (ENGINE, HOUSEKEEPING, FRONT_END):
        for mark, name in known.items():
            if mark in command:
                return name
    return command.split(" ")[0].rpartition("/")[2][:40] or "unknown"


def is_engine(name: str) -> bool:
    return name in ENGINE.values()


def is_housekeeping(name: str) -> bool:
    return name in HOUSEKEEPING.values()


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Holds the CPU that processes had used at one moment."""

    at_s: float
    cpu_s: Mapping[str, float]  # by role


class ProcessFamily:
    """Reads the processes that a server had when this was made. One that ends keeps its last reading."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        """`pids`: the root processes: the server's own, and for a proxy also that of the server behind it."""
        self._members: list[tuple[str, psutil.Process]] = []
        for process in {member for pid in pids for member in family(pid)}:
            with contextlib.suppress(psutil.Error):
                self._members.append((role(" ".join(process.cmdline()) or process.name()), process))
        self._last: dict[int, float] = {}

    def read_cpu(self) -> CpuReading:
        cpu_s: Seconds = defaultdict(float)
        for name, process in self._members:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._last[process.pid] = times.user + times.system
            cpu_s[name] += self._last.get(process.pid, 0.0)
        return CpuReading(time.perf_counter(), dict(cpu_s))

    def memory_mb(self) -> dict[str, int]:
        """Returns proportional set sizes: pages that processes share are divided between them."""
        by_role: dict[str, int] = defaultdict(int)
        for name, process in self._members:
            with contextlib.suppress(psutil.Error):
                by_role[name] += process.memory_full_info().pss
        return {name: size >> 20 for name, size in sorted(by_role.items(), key=lambda item: -item[1])}


def cpu_used(before: CpuReading, after: CpuReading) -> Seconds:
    """Returns the CPU seconds between two readings, by role."""
    return {name: after.cpu_s[name] - before.cpu_s.get(name, 0.0) for name in after.cpu_s}


def idle_percent(before: CpuReading, after: CpuReading) -> dict[str, float]:
    """Returns the percent of one core used between two readings, by role. No request came between them."""
    wall_s = after.at_s - before.at_s
    return {name: round(100 * seconds / wall_s, 2) for name, seconds in cpu_used(before, after).items()}


def front_end_s(cpu_s: Seconds, wall_s: float, idle: Mapping[str, float]) -> float:
    """Returns the CPU seconds of everything around the engine.

    Processes that a request passes through count in full. Ray's housekeeping counts with what it used
    beyond its idle rate (`idle`, in percent of a core by role), which is reported on its own.
    """
    total_s = 0.0
    for name, seconds in cpu_s.items():
        if is_housekeeping(name):
            total_s += max(0.0, seconds - wall_s * idle.get(name, 0.0) / 100)
        elif not is_engine(name):
            total_s += seconds
    return total_s
