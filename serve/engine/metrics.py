"""Renders the counters of engine processes in Prometheus' form."""

from collections.abc import Iterable
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.engine.protocol import GRAMMAR_CPU_S_BUCKETS, Counters, GrammarCounts, Load, Residency


class EngineCounters(Collector):
    """Collects the engines' own counters, for `bespoke usage --reconcile`."""

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
        load, residency, grammars = _Load(labels[:3]), _Residency(labels[:3]), _Grammars(labels[:3])
        for counters in self._counters:
            engine = [counters.base, counters.replica, counters.boot]
            total.add_metric([*engine, "prompt"], counters.prompt_tokens)
            total.add_metric([*engine, "completion"], counters.completion_tokens)
            probe.add_metric([*engine, "prompt"], counters.probe_prompt_tokens)
            probe.add_metric([*engine, "completion"], counters.probe_completion_tokens)
            running.add_metric(engine, counters.running)
            load.add(engine, counters.load)
            residency.add(engine, counters.residency)
            grammars.add(engine, counters.grammars)
        return [total, probe, running, *load.families, *residency.families, *grammars.families]


class _Load:
    """Renders vLLM's load."""

    def __init__(self, labels: list[str]) -> None:
        self._waiting = GaugeMetricFamily(
            "bespoke_vllm_requests_waiting", "Requests in vLLM's queue.", labels=labels
        )
        self._kv_used = GaugeMetricFamily(
            "bespoke_vllm_kv_cache_used_ratio",
            "Of vLLM's KV cache, what running requests hold.",
            labels=labels,
        )
        self._preemptions = CounterMetricFamily(
            "bespoke_vllm_preemptions", "Requests that lost their place in the KV cache.", labels=labels
        )
        self._queries = CounterMetricFamily(
            "bespoke_vllm_prefix_cache_query_tokens", "Prompt tokens looked for in the cache.", labels=labels
        )
        self._hits = CounterMetricFamily(
            "bespoke_vllm_prefix_cache_hit_tokens", "Prompt tokens that were found in it.", labels=labels
        )
        self.families = (self._waiting, self._kv_used, self._preemptions, self._queries, self._hits)

    def add(self, engine: list[str], load: Load) -> None:
        self._waiting.add_metric(engine, load.waiting)
        self._kv_used.add_metric(engine, load.kv_used)
        self._preemptions.add_metric(engine, load.preemptions)
        self._queries.add_metric(engine, load.prefix_queries)
        self._hits.add_metric(engine, load.prefix_hits)


class _Residency:
    """Renders the adapters of each replica by tier, and their loads.

    Adapters themselves are no labels here.
    """

    def __init__(self, labels: list[str]) -> None:
        by_tier = [*labels, "tier"]
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
            "bespoke_slot_waiting_requests", "Requests waiting for a slot for their adapter.", labels=labels
        )
        self._wait_max = GaugeMetricFamily(
            "bespoke_slot_wait_seconds_max", "The longest such wait since the replica started.", labels=labels
        )
        self.families = (
            *(self._adapters, self._loads, self._seconds, self._evictions),
            *(self._waiting, self._wait_max),
        )

    def add(self, engine: list[str], residency: Residency) -> None:
        slot, memory, disk = ([*engine, tier] for tier in ("slot", "memory", "disk"))
        for labels, count in ((slot, residency.slots), (memory, residency.memory), (disk, residency.disk)):
            self._adapters.add_metric(labels, count)
        for labels, loads, seconds, evictions in (
            (slot, residency.slot_loads, residency.slot_load_s, residency.slot_evictions),
            (memory, residency.memory_loads, residency.memory_load_s, residency.memory_evictions),
        ):
            self._loads.add_metric(labels, loads)
            self._seconds.add_metric(labels, seconds)
            self._evictions.add_metric(labels, evictions)
        self._waiting.add_metric(engine, residency.waiting)
        self._wait_max.add_metric(engine, residency.wait_s_max)


class _Grammars:
    """Renders what became of the grammars that each replica was asked for first."""

    def __init__(self, labels: list[str]) -> None:
        self._refusals = CounterMetricFamily(
            "bespoke_grammar_refusals",
            "Grammars refused: wrong, too complex, or too many of a tenant at once (waiting).",
            labels=[*labels, "reason"],
        )
        self._seconds = HistogramMetricFamily(
            "bespoke_grammar_compile_seconds", "CPU that compiling a new grammar took.", labels=labels
        )
        self._waiting = GaugeMetricFamily(
            "bespoke_grammars_waiting", "New grammars that wait to be compiled.", labels=labels
        )
        self.families = (self._refusals, self._seconds, self._waiting)

    def add(self, engine: list[str], grammars: GrammarCounts) -> None:
        for reason, count in (
            ("wrong", grammars.wrong),
            ("too_complex", grammars.too_complex),
            ("waiting", grammars.overloads),
        ):
            self._refusals.add_metric([*engine, reason], count)
        sums = accumulate(grammars.buckets)
        bounds = [*(str(bound) for bound in GRAMMAR_CPU_S_BUCKETS), "+Inf"]
        self._seconds.add_metric(engine, list(zip(bounds, sums, strict=True)), grammars.cpu_s)
        self._waiting.add_metric(engine, grammars.waiting)


def render_engines(counters: list[Counters]) -> bytes:
    registry = CollectorRegistry()
    registry.register(EngineCounters(counters))
    return generate_latest(registry)
