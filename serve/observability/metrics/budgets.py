"""Renders the use of budgets in Prometheus' form."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.billing.budgets.alerts import SHOWN_MAX, BudgetFigures


class BudgetCollector(Collector):
    """Collects the fullest budgets, by ids that do not reveal the customers."""

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
        notices = CounterMetricFamily("bespoke_budget_notices", "Thresholds of budgets that were told.")
        notices.add_metric([], self._figures.notices)
        return [used, notices]


def render_budgets(figures: BudgetFigures) -> bytes:
    registry = CollectorRegistry()
    registry.register(BudgetCollector(figures))
    return generate_latest(registry)
