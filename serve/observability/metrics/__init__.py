"""Collects Prometheus metrics of gateways and budgets, and joins the expositions of all gateways.

`gateway.py` counts what one process does, `token_latency.py` the time between its tokens; `budgets.py`
renders the use of budgets, `aggregate.py` merges all gateways' expositions. Engines render theirs in
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
