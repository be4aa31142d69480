"""Renders what engine processes count, in Prometheus' form."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine.protocol import Counters, Load, Residency


class EngineCounters(Collector):
    """The engines' own counters in Prometheus' form, for `bespoke usage --reconcile`."""

    def __init__(self, counters: list[Counters]) -> None:
        self._counters = counters

    def collect(self) -> Iterable[Metric]:
        labels = ["base", "replica", "boot", "class"]
        total = GaugeMetricFamily(
            "bespoke_vllm_tokens", "Tokens counted by vLLM since it started.", labels=labels
        )
        probe = GaugeMetricFamily(
            "bespoke_probe_tokens",
            "Of these, tokens of the checks of the base and of new adapters.",
            labels=labels,
        )
        running = GaugeMetricFamily(
            "bespoke_vllm_requests_running", "Requests in vLLM's batch.", labels=labels[:3]
        )
        load, residency = _Load(labels[:3]), _Residency(labels[:3])
        for one in self._counters:
            who = [one.base, one.replica, one.boot]
            total.add_metric([*who, "prompt"], one.prompt_tokens)
            total.add_metric([*who, "completion"], one.completion_tokens)
            probe.add_metric([*who, "prompt"], one.probe_prompt_tokens)
            probe.add_metric([*who, "completion"], one.probe_completion_tokens)
            running.add_metric(who, one.running)
            load.add(who, one.load)
            residency.add(who, one.residency)
        return [total, probe, running, *load.families, *residency.families]


class _Load:
    """How full vLLM is."""

    def __init__(self, who: list[str]) -> None:
        self._waiting = GaugeMetricFamily(
            "bespoke_vllm_requests_waiting", "Requests in vLLM's queue.", labels=who
        )
        self._kv_used = GaugeMetricFamily(
            "bespoke_vllm_kv_cache_used_ratio", "Of vLLM's KV cache, what running requests hold.", labels=who
        )
        self._preemptions = CounterMetricFamily(
            "bespoke_vllm_preemptions", "Requests that lost their place in the KV cache.", labels=who
        )
        self._asked = CounterMetricFamily(
            "bespoke_vllm_prefix_cache_asked_tokens", "Prompt tokens looked for in the cache.", labels=who
        )
        self._found = CounterMetricFamily(
            "bespoke_vllm_prefix_cache_found_tokens", "Prompt tokens that were found in it.", labels=who
        )
        self.families = (self._waiting, self._kv_used, self._preemptions, self._asked, self._found)

    def add(self, who: list[str], one: Load) -> None:
        self._waiting.add_metric(who, one.waiting)
        self._kv_used.add_metric(who, one.kv_used)
        self._preemptions.add_metric(who, one.preemptions)
        self._asked.add_metric(who, one.prefix_asked)
        self._found.add_metric(who, one.prefix_found)


class _Residency:
    """Where each replica's adapters are and what moved, by tier; adapters themselves are no labels here."""

    def __init__(self, who: list[str]) -> None:
        by_tier = [*who, "tier"]
        self._adapters = GaugeMetricFamily(
            "bespoke_adapters_resident",
            "Adapters in slots, in memory (slots included), on disk.",
            labels=by_tier,
        )
        self._loads = CounterMetricFamily(
            "bespoke_adapter_loads", "Adapters loaded from the next tier.", labels=by_tier
        )
        self._seconds = CounterMetricFamily(
            "bespoke_adapter_load_seconds", "Time that these loads took.", labels=by_tier
        )
        self._evictions = CounterMetricFamily(
            "bespoke_adapter_evictions", "Adapters that made room for others.", labels=by_tier
        )
        self._waiting = GaugeMetricFamily(
            "bespoke_slot_waiting_requests", "Requests waiting for a slot for their adapter.", labels=who
        )
        self._wait_max = GaugeMetricFamily(
            "bespoke_slot_wait_seconds_max", "The longest such wait since the replica started.", labels=who
        )
        self.families = (
            *(self._adapters, self._loads, self._seconds, self._evictions),
            *(self._waiting, self._wait_max),
        )

    def add(self, who: list[str], one: Residency) -> None:
        slot, memory, disk = ([*who, tier] for tier in ("slot", "memory", "disk"))
        for labels, count in ((slot, one.slots), (memory, one.memory), (disk, one.disk)):
            self._adapters.add_metric(labels, count)
        for labels, loads, seconds, evictions in (
            (slot, one.slot_loads, one.slot_load_s, one.slot_evictions),
            (memory, one.memory_loads, one.memory_load_s, one.memory_evictions),
        ):
            self._loads.add_metric(labels, loads)
            self._seconds.add_metric(labels, seconds)
            self._evictions.add_metric(labels, evictions)
        self._waiting.add_metric(who, one.waiting)
        self._wait_max.add_metric(who, one.wait_s_max)


def render_engines(counters: list[Counters]) -> bytes:
    registry = CollectorRegistry()
    registry.register(EngineCounters(counters))
    return generate_latest(registry)
