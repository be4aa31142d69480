"""Renders the steward's status as Prometheus metrics.

While the steward is unreachable, only `bespoke_steward_up` is rendered.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.maintenance.steward import StewardStatus


class StewardCollector(Collector):
    def __init__(self, status: StewardStatus | None) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("bespoke_steward_up", "Whether the steward answers.")
        up.add_metric([], self._status is not None)
        if self._status is None:
            return [up]
        status = self._status
        return [up, *_holds(status), *_jobs(status), *_outbox(status), *_drift(status)]


def _holds(status: StewardStatus) -> Iterable[Metric]:
    held = GaugeMetricFamily("bespoke_open_holds", "Requests that are neither settled nor voided.")
    held.add_metric([], status.open_holds)
    oldest = GaugeMetricFamily("bespoke_oldest_hold_seconds", "Age of the oldest of them.")
    oldest.add_metric([], status.oldest_hold_s)
    recovered = CounterMetricFamily(
        "bespoke_recovered_requests", "Requests of dead gateways that were closed.", labels=["outcome"]
    )
    recovered.add_metric(["settled"], status.recovered_settled)
    recovered.add_metric(["voided"], status.recovered_voided)
    return [held, oldest, recovered]


def _jobs(status: StewardStatus) -> Iterable[Metric]:
    ages = GaugeMetricFamily(
        "bespoke_steward_job_age_seconds", "How long ago each job was last done.", labels=["steward_job"]
    )
    intervals = GaugeMetricFamily(
        "bespoke_steward_job_interval_seconds", "How often each is to be done.", labels=["steward_job"]
    )
    failures = CounterMetricFamily(
        "bespoke_steward_job_failures", "Rounds of a job that failed.", labels=["steward_job"]
    )
    for family, values in (
        (ages, status.jobs),
        (intervals, status.intervals),
        (failures, status.failures),
    ):
        for name, value in values.items():
            family.add_metric([name], value)
    return [ages, intervals, failures]


def _outbox(status: StewardStatus) -> Iterable[Metric]:
    outbox = status.outbox
    by_state = GaugeMetricFamily(
        "bespoke_webhook_events", "Notices for webhooks that are not taken yet.", labels=["state"]
    )
    by_state.add_metric(["new"], outbox.pending - outbox.failing)
    by_state.add_metric(["failing"], outbox.failing)
    oldest = GaugeMetricFamily("bespoke_oldest_webhook_event_seconds", "Age of the oldest of them.")
    oldest.add_metric([], status.oldest_event_s)
    closed = CounterMetricFamily(
        "bespoke_webhook_events_closed",
        "Notices that were taken, or given up after a day.",
        labels=["outcome"],
    )
    closed.add_metric(["delivered"], outbox.delivered)
    closed.add_metric(["given_up"], outbox.given_up)
    return [by_state, oldest, closed]


def _drift(status: StewardStatus) -> Iterable[Metric]:
    drift = GaugeMetricFamily(
        "bespoke_ledger_drift_tokens",
        "Tokens that an engine process counted and the ledger did not, when nothing was under way.",
        labels=["base", "replica", "boot", "class"],
    )
    for entry in status.drift:
        engine_labels = [entry.engine.base, entry.engine.replica, entry.engine.boot]
        drift.add_metric([*engine_labels, "prompt"], entry.prompt_drift)
        drift.add_metric([*engine_labels, "completion"], entry.completion_drift)
    if status.drift_at is None:
        return [drift]
    at = GaugeMetricFamily("bespoke_ledger_drift_timestamp_seconds", "When that was (Unix time).")
    at.add_metric([], status.drift_at)
    return [drift, at]


def render(status: StewardStatus | None) -> bytes:
    registry = CollectorRegistry()
    registry.register(StewardCollector(status))
    return generate_latest(registry)
