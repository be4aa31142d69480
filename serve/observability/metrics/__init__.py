"""Prometheus metrics: what a gateway counts, what the engines and the budgets say, and all gateways' as one.

`gateway.py` is one process's own, `pace.py` its tokens' pace; `engines.py` and `budgets.py` render what
others count; `fleet.py` merges what all gateways say. What the steward measures: `serve.maintenance.metrics`.
"""

from serve.observability.metrics.aggregate import Exposition, Peers, merge, render_fleet
from serve.observability.metrics.engines import render_budgets, render_engines
from serve.observability.metrics.gateway import ALONE, Metrics
from serve.observability.metrics.token_latency import Pace

__all__ = [
    "ALONE",
    "Exposition",
    "Metrics",
    "Pace",
    "Peers",
    "merge",
    "render_budgets",
    "render_engines",
    "render_fleet",
]
