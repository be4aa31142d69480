"""What the steward measured, in Prometheus' form. Absent, but for `bespoke_steward_up`, while it is away."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.steward import Measurements


class StewardCollector(Collector):
    def __init__(self, measured: Measurements | None) -> None:
        self._measured = measured

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("bespoke_steward_up", "Whether the steward answers.")
        up.add_metric([], self._measured is not None)
        return [up] if self._measured is None else [up, *_holds(self._measured), *_drift(self._measured)]


def _holds(measured: Measurements) -> Iterable[Metric]:
    held = GaugeMetricFamily("bespoke_open_holds", "Requests that are neither settled nor voided.")
    held.add_metric([], measured.open_holds)
    oldest = GaugeMetricFamily("bespoke_oldest_hold_seconds", "Age of the oldest of them.")
    oldest.add_metric([], measured.oldest_hold_s)
    recovered = CounterMetricFamily(
        "bespoke_recovered_requests", "Requests of dead gateways that were closed.", labels=["outcome"]
    )
    recovered.add_metric(["settled"], measured.recovered_settled)
    recovered.add_metric(["voided"], measured.recovered_voided)
    chores = GaugeMetricFamily(
        "bespoke_steward_chore_age_seconds", "How long ago each chore was last done.", labels=["chore"]
    )
    for name, age_s in measured.chores.items():
        chores.add_metric([name], age_s)
    return [held, oldest, recovered, chores]


def _drift(measured: Measurements) -> Iterable[Metric]:
    drift = GaugeMetricFamily(
        "bespoke_ledger_drift_tokens",
        "Tokens that an engine process counted and the ledger did not, when nothing was under way.",
        labels=["base", "replica", "boot", "class"],
    )
    for entry in measured.drift:
        who = [entry.engine.base, entry.engine.replica, entry.engine.boot]
        drift.add_metric([*who, "prompt"], entry.prompt_drift)
        drift.add_metric([*who, "completion"], entry.completion_drift)
    if measured.drift_at is None:
        return [drift]
    at = GaugeMetricFamily("bespoke_ledger_drift_timestamp_seconds", "When that was (Unix time).")
    at.add_metric([], measured.drift_at)
    return [drift, at]


def render(measured: Measurements | None) -> bytes:
    registry = CollectorRegistry()
    registry.register(StewardCollector(measured))
    return generate_latest(registry)
