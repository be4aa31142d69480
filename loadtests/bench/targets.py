"""Computes each server's figures from the stages, and compares ours with the targets.

Figures are those of RATIOS, two latencies and the idle CPU. AT_LEAST and AT_MOST are the targets.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from loadtests.bench.bespoke_server import BESPOKE
from loadtests.bench.statistics import spread
from loadtests.peers.vllm_server import BARE

BASE_16, MIXED_16, MIXED_64 = "base, 16 streams", "mixed, 16 streams", "mixed, 64 streams"
# Figure → base model, workload, and the turn's value that is divided by the bare server's in the same pair.
RATIOS = {
    "ratio_16": ("smollm2-135m", MIXED_16, "tokens_per_s"),
    "ratio_64": ("smollm2-135m", MIXED_64, "tokens_per_s"),
    "tiny_ratio": ("tiny", BASE_16, "tokens_per_s"),
    "tiny_mixed_ratio": ("tiny", MIXED_16, "tokens_per_s"),
    "front_cpu_ratio": ("tiny", BASE_16, "front_cpu_s_per_1k"),
}
AT_LEAST = {"ratio_16": 0.97, "ratio_64": 0.97, "tiny_ratio": 0.90}
AT_MOST = {"added_ttft_p50_ms": 3.0, "added_ttft_p99_ms": 10.0, "front_cpu_ratio": 1.25}
Stages = Mapping[str, Mapping[str, Any]]


def server_names(stages: Stages) -> list[str]:
    """Returns ours, bare, then the peers in the order in which the stages name them."""
    names = [BESPOKE, BARE]
    for stage in stages.values():
        names += [peer for peer in stage["peers"] if peer not in names]
    return names


def summary(stages: Stages) -> dict[str, Any]:
    """Returns the object that `make bench` prints last: our figures on top, each peer's under its name."""
    by_server = {name: server_summary(name, stages) for name in server_names(stages) if name != BARE}
    ours = by_server.pop(BESPOKE)
    return ours | by_server


def server_summary(name: str, stages: Stages) -> dict[str, float | None]:
    """Returns a server's figures; None stands for a figure that no stage measured. Ours use every stage."""
    ratios = {figure: _median(ratio_spread(name, figure, stages)) for figure in RATIOS}
    timed = [stage["latency"][name] for stage in _with(name, stages) if "latency" in stage]
    latencies = {
        f"added_ttft_p{p}_ms": _median(_spread(latency[f"p{p}"]["ms"] for latency in timed)) for p in (50, 99)
    }
    idle = _median(_spread(stage["idle"][name]["percent"] for stage in _with(name, stages)))
    return ratios | latencies | {"idle_cpu_pct": idle}


def ratio_spread(name: str, figure: str, stages: Stages) -> dict[str, float] | None:
    """Returns the spread of a ratio over the pairs of all stages that measured it.

    Both values of a ratio are of the same pair.
    """
    base, workload, value = RATIOS[figure]
    pairs: list[float] = []
    for stage in _with(name, stages):
        if stage["base"] == base and workload in stage["closed"]:
            servers = stage["closed"][workload]["servers"]
            turns = zip(servers[name]["turns"], servers[BARE]["turns"], strict=True)
            pairs += [turn[value] / bare[value] for turn, bare in turns if bare[value]]
    return spread(pairs) if pairs else None


def met_targets(figures: Mapping[str, Any]) -> dict[str, bool]:
    """Compares our figures with the targets. A figure that was not measured misses its target."""
    high = {figure: (figures.get(figure) or 0.0) >= least for figure, least in AT_LEAST.items()}
    low = {
        figure: figures.get(figure) is not None and figures[figure] <= most
        for figure, most in AT_MOST.items()
    }
    return high | low


def _with(name: str, stages: Stages) -> list[Mapping[str, Any]]:
    return [stage for stage in stages.values() if name in stage["idle"]]


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    measured = list(values)
    return spread(measured, 2) if measured else None


def _median(values: dict[str, float] | None) -> float | None:
    return values["median"] if values else None
