"""Renders the use of budgets in Prometheus' form."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.billing.budgets.alerts import SHOWN_MAX, BudgetMetrics


class BudgetCollector(Collector):
    """Collects the fullest budgets, by ids that do not reveal the customers."""

    def __init__(self, figures: BudgetMetrics) -> None:
        self._figures = figures

    def collect(self) -> Iterable[Metric]:
        used = GaugeMetricFamily(
            "bespoke_budget_used_ratio",
            f"Spent of the limit in the current period: the {SHOWN_MAX} fullest budgets.",
            labels=["budget", "level", "period"],
        )
        for budget, level, period, ratio in self._figures.used:
            used.add_metric([budget, level, period], ratio)
        alerts = CounterMetricFamily("bespoke_budget_alerts", "Thresholds of budgets that were told.")
        alerts.add_metric([], self._figures.alerts)
        return [used, alerts]


def render_budgets(figures: BudgetMetrics) -> bytes:
    registry = CollectorRegistry()
    registry.register(BudgetCollector(figures))
    return generate_latest(registry)
