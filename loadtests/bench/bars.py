"""From the stages to the bench's one object: the bars of ours, and the same figures of each peer."""

from collections.abc import Iterable, Mapping
from typing import Any

from loadtests.bench.figures import spread
from loadtests.bench.group import BARE
from loadtests.bench.ours import NAME

BASE_16, MIXED_16, MIXED_64 = "base, 16 streams", "mixed, 16 streams", "mixed, 64 streams"
# Each bar: the base model, the work, and the ratio that is made within a pair.
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


def servers(stages: Stages) -> list[str]:
    """Ours, bare, then the peers, in the order in which the stages name them."""
    names = [NAME, BARE]
    for stage in stages.values():
        names += [peer for peer in stage["peers"] if peer not in names]
    return names


def bars(stages: Stages) -> dict[str, Any]:
    """What `make bench` prints last: our figures at the top, each peer's under its name."""
    told = {name: figures_of(name, stages) for name in servers(stages) if name != BARE}
    ours = told.pop(NAME)
    return ours | told


def figures_of(name: str, stages: Stages) -> dict[str, float | None]:
    """A server's bars; None for what no stage measured. Ours come from every stage."""
    ratios = {bar: _median(ratio_spread(name, bar, stages)) for bar in RATIOS}
    timed = [stage["latency"][name] for stage in _with(name, stages) if "latency" in stage]
    latencies = {
        f"added_ttft_p{p}_ms": _median(_spread(one[f"p{p}"]["ms"] for one in timed)) for p in (50, 99)
    }
    idle = _median(_spread(one["idle"][name]["percent"] for one in _with(name, stages)))
    return ratios | latencies | {"idle_cpu_pct": idle}


def ratio_spread(name: str, bar: str, stages: Stages) -> dict[str, float] | None:
    """Over the pairs of all stages that measured the bar; a ratio never leaves its own pair."""
    base, work, figure = RATIOS[bar]
    pairs: list[float] = []
    for stage in _with(name, stages):
        if stage["base"] == base and work in stage["closed"]:
            told = stage["closed"][work]["servers"]
            turns = zip(told[name]["turns"], told[BARE]["turns"], strict=True)
            pairs += [mine[figure] / theirs[figure] for mine, theirs in turns if theirs[figure]]
    return spread(pairs) if pairs else None


def met(told: Mapping[str, Any]) -> dict[str, bool]:
    """Ours against the bars; what was not measured is not met."""
    high = {bar: (told.get(bar) or 0.0) >= floor for bar, floor in AT_LEAST.items()}
    low = {bar: told.get(bar) is not None and told[bar] <= roof for bar, roof in AT_MOST.items()}
    return high | low


def _with(name: str, stages: Stages) -> list[Mapping[str, Any]]:
    return [stage for stage in stages.values() if name in stage["idle"]]


def _spread(values: Iterable[float]) -> dict[str, float] | None:
    taken = list(values)
    return spread(taken, 2) if taken else None


def _median(told: dict[str, float] | None) -> float | None:
    return told["median"] if told else None
