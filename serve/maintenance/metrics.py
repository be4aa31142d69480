"""What the steward measured, in Prometheus' form. Absent, but for `bespoke_steward_up`, while it is away."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from serve.maintenance.steward import StewardStatus


class StewardCollector(Collector):
    def __init__(self, measured: StewardStatus | None) -> None:
        self._measured = measured

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("bespoke_steward_up", "Whether the steward answers.")
        up.add_metric([], self._measured is not None)
        if self._measured is None:
            return [up]
        measured = self._measured
        return [up, *_holds(measured), *_jobs(measured), *_notices(measured), *_drift(measured)]


def _holds(measured: StewardStatus) -> Iterable[Metric]:
    held = GaugeMetricFamily("bespoke_open_holds", "Requests that are neither settled nor voided.")
    held.add_metric([], measured.open_holds)
    oldest = GaugeMetricFamily("bespoke_oldest_hold_seconds", "Age of the oldest of them.")
    oldest.add_metric([], measured.oldest_hold_s)
    recovered = CounterMetricFamily(
        "bespoke_recovered_requests", "Requests of dead gateways that were closed.", labels=["outcome"]
    )
    recovered.add_metric(["settled"], measured.recovered_settled)
    recovered.add_metric(["voided"], measured.recovered_voided)
    return [held, oldest, recovered]


def _jobs(measured: StewardStatus) -> Iterable[Metric]:
    ages = GaugeMetricFamily(
        "bespoke_steward_chore_age_seconds", "How long ago each chore was last done.", labels=["chore"]
    )
    intervals = GaugeMetricFamily(
        "bespoke_steward_chore_interval_seconds", "How often each is to be done.", labels=["chore"]
    )
    failures = CounterMetricFamily(
        "bespoke_steward_chore_failures", "Rounds of a chore that failed.", labels=["chore"]
    )
    for family, values in (
        (ages, measured.jobs),
        (intervals, measured.intervals),
        (failures, measured.failures),
    ):
        for name, value in values.items():
            family.add_metric([name], value)
    return [ages, intervals, failures]


def _notices(measured: StewardStatus) -> Iterable[Metric]:
    told = measured.notices
    by_state = GaugeMetricFamily(
        "bespoke_notices", "Notices for webhooks that are not taken yet.", labels=["state"]
    )
    by_state.add_metric(["new"], told.pending - told.failing)
    by_state.add_metric(["failing"], told.failing)
    oldest = GaugeMetricFamily("bespoke_oldest_notice_seconds", "Age of the oldest of them.")
    oldest.add_metric([], measured.oldest_notice_s)
    done = CounterMetricFamily(
        "bespoke_notices_closed", "Notices that were taken, or given up after a day.", labels=["outcome"]
    )
    done.add_metric(["delivered"], told.delivered)
    done.add_metric(["given_up"], told.given_up)
    return [by_state, oldest, done]


def _drift(measured: StewardStatus) -> Iterable[Metric]:
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


def render(measured: StewardStatus | None) -> bytes:
    registry = CollectorRegistry()
    registry.register(StewardCollector(measured))
    return generate_latest(registry)
