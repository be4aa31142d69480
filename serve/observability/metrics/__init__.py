"""Prometheus metrics of gateways and budgets, and the exposition that joins all gateways.

`gateway.py` counts what one process does, `token_latency.py` the time between its tokens; `budgets.py`
renders how full budgets are; `aggregate.py` merges what all gateways say. Engines render theirs in
`serve.engine.metrics`, the steward in `serve.maintenance.metrics`.
"""

from serve.observability.metrics.aggregate import Exposition, GatewayPeers, merge, render_aggregate
from serve.observability.metrics.budgets import render_budgets
from serve.observability.metrics.gateway import ALONE, Metrics
from serve.observability.metrics.token_latency import TokenLatency

__all__ = [
    "ALONE",
    "Exposition",
    "GatewayPeers",
    "Metrics",
    "TokenLatency",
    "merge",
    "render_aggregate",
    "render_budgets",
]
