"""Prometheus metrics: what a gateway counts, what the engines and the budgets say, and all gateways' as one.

`gateway.py` is one process's own, `pace.py` its tokens' pace; `engines.py` and `budgets.py` render what
others count; `fleet.py` merges what all gateways say. What the steward measures: `serve.steward_metrics`.
"""

from serve.metrics.budgets import render_budgets
from serve.metrics.engines import render_engines
from serve.metrics.fleet import Exposition, Peers, merge, render_fleet
from serve.metrics.gateway import ALONE, Metrics
from serve.metrics.pace import Pace

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
