"""Lists each metric that the code declares, with its labels: everything that /metrics can contain."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from prometheus_client.parser import text_string_to_metric_families

from serve.billing.budgets.alerts import BudgetMetrics
from serve.billing.metering.reconciliation import EngineCount, reconcile
from serve.billing.pricing.plans import Tokens
from serve.billing.webhooks.outbox import OutboxMetrics
from serve.engine.metrics import render_engines
from serve.engine.protocol import Counters, Delta
from serve.errors import RateLimited
from serve.maintenance import metrics as steward_metrics
from serve.maintenance.steward import StewardStatus
from serve.observability.metrics import (
    Metrics,
    TokenLatency,
    merge,
    render_aggregate,
    render_budgets,
)

Names = Mapping[str, frozenset[str]]


def names(text: str) -> Names:
    """Each series' name, with all labels that it has anywhere in the exposition."""
    labels_of: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels_of[sample.name] |= sample.labels.keys()
    return {name: frozenset(labels) for name, labels in labels_of.items()}


def busy() -> Metrics:
    """The metrics of a gateway that has counted every kind of event."""
    metrics = Metrics(adapters_max=1, gateway="busy")
    token_latency = TokenLatency(1)
    for _ in range(2):
        token_latency.note([Delta(0, "x", 1)])
    metrics.request("/v1/chat/completions", 429, 0.1)
    metrics.refused(RateLimited("requests", 1, 1, 1, 1), "requests", "rate_limit_exceeded")
    metrics.broken("/v1/chat/completions", "server_error", "engine_failed")
    metrics.closed("tiny", "acme/support@1", "complete")
    metrics.tokens("tiny", "acme/support@1", Tokens(3, 1, 2))
    metrics.billed("tiny", 1_000, "USD")
    metrics.ttft("tiny", "acme/support@1", 0.2)
    metrics.token_latency("tiny", "acme/support@1", token_latency)
    return metrics


def measured() -> StewardStatus:
    count = EngineCount("tiny", "r", "b", 10, 5, 0, 0)
    return StewardStatus(
        drift=tuple(reconcile([count], {})),
        drift_at=1.0,
        jobs={"recover": 1.0},
        budgets=BudgetMetrics((("bud_1", "tenant", "month", 0.5),), 1),
        intervals={"recover": 1.0},
        failures={"recover": 1},
        outbox=OutboxMetrics(pending=1),
    )


def declared() -> Names:
    """The metrics of an exposition that contains every metric."""
    everything: Iterable[bytes] = (
        busy().exposition().text,
        render_aggregate(1, 1, {"tiny": 1}),
        render_engines([Counters("tiny", "r", "b", 1, 1, 1, 1, 0)]),
        steward_metrics.render(measured()),
        render_budgets(measured().budgets),
    )
    return names(merge(everything).decode())
