"""Prometheus metrics of a gateway process.

Labels are bases, routes and status codes only. Tenants and adapters are never labels: their number
has no bound, and /metrics must not tell one customer about another.
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
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.billing.pricing import Tokens
from serve.engine.base import Counters

disable_created_metrics()  # type: ignore[no-untyped-call] # a second series per series, which no dashboard of ours reads

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
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

    def request(self, route: str, code: int) -> None:
        self._requests.labels(route, str(code)).inc()

    def closed(self, status: str) -> None:
        self._closed.labels(status).inc()

    def tokens(self, base: str, tokens: Tokens) -> None:
        self._tokens.labels(base, "prompt").inc(tokens.uncached)
        self._tokens.labels(base, "cached_prompt").inc(tokens.cached)
        self._tokens.labels(base, "completion").inc(tokens.completion)

    def ttft(self, base: str, seconds: float) -> None:
        self._ttft.labels(base).observe(seconds)


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
            "bespoke_probe_tokens", "Of these, tokens of the start-up check.", labels=labels
        )
        running = GaugeMetricFamily(
            "bespoke_vllm_requests_running", "Requests in vLLM's batch.", labels=labels[:3]
        )
        loaded = GaugeMetricFamily(
            "bespoke_adapters_loaded", "Adapters this replica has loaded.", labels=labels[:3]
        )
        for one in self._counters:
            who = [one.base, one.replica, one.boot]
            total.add_metric([*who, "prompt"], one.prompt_tokens)
            total.add_metric([*who, "completion"], one.completion_tokens)
            probe.add_metric([*who, "prompt"], one.probe_prompt_tokens)
            probe.add_metric([*who, "completion"], one.probe_completion_tokens)
            running.add_metric(who, one.running)
            loaded.add_metric(who, len(one.adapters))
        return [total, probe, running, loaded]


def render(metrics: Metrics, counters: list[Counters]) -> bytes:
    """Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats)."""
    engines = CollectorRegistry()
    engines.register(EngineCounters(counters))
    return generate_latest(metrics.registry) + generate_latest(engines)
