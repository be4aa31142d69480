"""Which process of a server used how much CPU and memory, by the part that it plays."""

import contextlib
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from loadtests.peers.process import family

REPLICA = re.compile(r"ServeReplica:[^:]+:([^:. ]+)")
# The first that is found in a command line; what is computed, not what is around it.
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
FRONT = {
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
    """The part that a process plays, by its command line or the title it has given itself."""
    if found := REPLICA.search(command):
        replica = found[1]
        return f"engine front ({replica})" if replica.startswith("engine-") else replica
    for known in (ENGINE, HOUSEKEEPING, FRONT):
        for mark, name in known.items():
            if mark in command:
                return name
    return command.split(" ")[0].rpartition("/")[2][:40] or "unknown"


def is_engine(name: str) -> bool:
    return name in ENGINE.values()


def is_housekeeping(name: str) -> bool:
    return name in HOUSEKEEPING.values()


@dataclass(frozen=True, slots=True)
class Moment:
    at_s: float
    cpu_s: Mapping[str, float]  # by role


class Family:
    """The processes of a server from the moment that it is made; those that end later keep what they had."""

    def __init__(self, pids: tuple[int, ...]) -> None:
        """`pids`: the roots. A proxy's are its own and that of the server behind it."""
        self._members: list[tuple[str, psutil.Process]] = []
        for process in {member for pid in pids for member in family(pid)}:
            with contextlib.suppress(psutil.Error):
                self._members.append((role(" ".join(process.cmdline()) or process.name()), process))
        self._last: dict[int, float] = {}

    def moment(self) -> Moment:
        cpu_s: Seconds = defaultdict(float)
        for name, process in self._members:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._last[process.pid] = times.user + times.system
            cpu_s[name] += self._last.get(process.pid, 0.0)
        return Moment(time.perf_counter(), dict(cpu_s))

    def memory_mb(self) -> dict[str, int]:
        """Proportional set size: pages that several processes share are shared out between them."""
        by_role: dict[str, int] = defaultdict(int)
        for name, process in self._members:
            with contextlib.suppress(psutil.Error):
                by_role[name] += process.memory_full_info().pss
        return {name: size >> 20 for name, size in sorted(by_role.items(), key=lambda item: -item[1])}


def used(before: Moment, after: Moment) -> Seconds:
    return {name: after.cpu_s[name] - before.cpu_s.get(name, 0.0) for name in after.cpu_s}


def idle_percent(before: Moment, after: Moment) -> dict[str, float]:
    """Of one core, by role, between two moments without a request."""
    wall_s = after.at_s - before.at_s
    return {name: round(100 * seconds / wall_s, 2) for name, seconds in used(before, after).items()}


def front_s(cpu_s: Seconds, wall_s: float, idle: Mapping[str, float]) -> float:
    """The CPU of what is around the engine.

    All of the processes that a request passes through, and of Ray's housekeeping what it used beyond its
    idle rate (`idle`, in percent of a core by role), which is reported on its own.
    """
    total_s = 0.0
    for name, seconds in cpu_s.items():
        if is_housekeeping(name):
            total_s += max(0.0, seconds - wall_s * idle.get(name, 0.0) / 100)
        elif not is_engine(name):
            total_s += seconds
    return total_s
