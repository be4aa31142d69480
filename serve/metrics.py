"""Prometheus metrics of a gateway process.

Labels are bases, routes, status codes and, within limits, adapters. The number of adapters has no bound
and their names are customers' own, so only the first `adapters_max` that a process sees are named and the
rest are `other`; whoever builds Metrics names none unless only the operator can read them.
"""

from collections.abc import Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.billing.pricing import Tokens
from serve.billing.thresholds import SHOWN_MAX, BudgetFigures
from serve.engine.base import Counters, Residency

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series per series, which no dashboard of ours reads

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_ADAPTER_TTFT_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # each is a series per adapter


class Metrics:
    """One gateway's metrics, in a registry of their own.

    `adapters_max` is how many adapters get a label of their own; `token` is what a reader must present.
    """

    def __init__(self, *, adapters_max: int = 0, token: str | None = None) -> None:
        self.token = token
        self._adapters_max = adapters_max
        self._adapters: set[str] = set()
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "bespoke_requests", "HTTP requests.", ["route", "code"], registry=self.registry
        )
        self.in_progress = Gauge(
            "bespoke_requests_in_progress", "Admitted requests not yet closed.", registry=self.registry
        )
        self._closed = Counter(
            "bespoke_requests_closed", "Admitted requests by outcome.", ["status"], registry=self.registry
        )
        self._journal_failures = Counter(
            "bespoke_journal_failures",
            "Writes to the gateway's journal that failed: its counts are safe only while it lives.",
            registry=self.registry,
        )
        self._retried = Counter(
            "bespoke_requests_retried",
            "Requests dispatched again because their replica died before the first token.",
            registry=self.registry,
        )
        self._tokens = Counter(
            "bespoke_tokens", "Billed tokens by class.", ["base", "class"], registry=self.registry
        )
        self._ttft = Histogram(
            "bespoke_time_to_first_token_seconds",
            "From admission to the first token.",
            ["base"],
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._adapter_requests = Counter(
            "bespoke_adapter_requests",
            "Admitted requests by adapter and outcome.",
            ["base", "adapter", "status"],
            registry=self.registry,
        )
        self._adapter_tokens = Counter(
            "bespoke_adapter_tokens",
            "Billed tokens by adapter and class.",
            ["base", "adapter", "class"],
            registry=self.registry,
        )
        self._adapter_ttft = Histogram(
            "bespoke_adapter_time_to_first_token_seconds",
            "From admission to the first token, by adapter.",
            ["base", "adapter"],
            buckets=_ADAPTER_TTFT_BUCKETS_S,
            registry=self.registry,
        )

    def journal_failed(self) -> None:
        self._journal_failures.inc()

    def request(self, route: str, code: int) -> None:
        self._requests.labels(route, str(code)).inc()

    def closed(self, base: str, adapter: str | None, status: str) -> None:
        self._closed.labels(status).inc()
        self._adapter_requests.labels(base, self._label(adapter), status).inc()

    def retried(self) -> None:
        self._retried.inc()

    def tokens(self, base: str, adapter: str | None, tokens: Tokens) -> None:
        label = self._label(adapter)
        classes = {
            "prompt": tokens.uncached,
            "cached_prompt": tokens.cached,
            "completion": tokens.completion,
        }
        for kind, count in classes.items():
            self._tokens.labels(base, kind).inc(count)
            self._adapter_tokens.labels(base, label, kind).inc(count)

    def ttft(self, base: str, adapter: str | None, seconds: float) -> None:
        self._ttft.labels(base).observe(seconds)
        self._adapter_ttft.labels(base, self._label(adapter)).observe(seconds)

    def _label(self, adapter: str | None) -> str:
        """`adapter` is a version's model name, or None for the bare base."""
        if adapter is None:
            return "none"
        if adapter not in self._adapters and len(self._adapters) >= self._adapters_max:
            return "other"
        self._adapters.add(adapter)
        return adapter


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
        residency = _Residency(labels[:3])
        for one in self._counters:
            who = [one.base, one.replica, one.boot]
            total.add_metric([*who, "prompt"], one.prompt_tokens)
            total.add_metric([*who, "completion"], one.completion_tokens)
            probe.add_metric([*who, "prompt"], one.probe_prompt_tokens)
            probe.add_metric([*who, "completion"], one.probe_completion_tokens)
            running.add_metric(who, one.running)
            residency.add(who, one.residency)
        return [total, probe, running, *residency.families]


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


class BudgetCollector(Collector):
    """The fullest budgets, by ids that tell nobody who the customers are."""

    def __init__(self, figures: BudgetFigures) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        used = GaugeMetricFamily(
            "bespoke_budget_used_ratio",
            f"Spent of the limit in the current period: the {SHOWN_MAX} fullest budgets.",
            labels=["budget", "level", "period"],
        )
        for budget, level, period, ratio in self._figures.used:
            used.add_metric([budget, level, period], ratio)
        told = CounterMetricFamily("bespoke_budget_notices", "Thresholds of budgets that were told.")
        told.add_metric([], self._figures.notices)
        return [used, told]


def render_budgets(figures: BudgetFigures) -> bytes:
    registry = CollectorRegistry()
    registry.register(BudgetCollector(figures))
    return generate_latest(registry)


def render(metrics: Metrics, counters: list[Counters]) -> bytes:
    """Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats)."""
    engines = CollectorRegistry()
    engines.register(EngineCounters(counters))
    return generate_latest(metrics.registry) + generate_latest(engines)
