"""Decides how many replicas there should be. Ray Serve calls `replicas_for` once a second, in its controller.

Serve does not see requests, which reach replicas over connections of their own. Replicas report how many they
have (`record_autoscaling_stats`). Bounds and delays are applied by Serve:
docs.ray.io/en/latest/serve/advanced-guides/advanced-autoscaling.html, custom policies.
"""

import math
from typing import Any

REQUESTS = "requests"


def replicas_for(context: Any) -> tuple[int, dict[str, Any]]:
    """Returns how many replicas give each its target of requests. `context` is Serve's AutoscalingContext."""
    requests = (context.aggregated_metrics or {}).get(REQUESTS) or {}
    ongoing = sum(requests.get(replica, 0.0) for replica in context.running_replicas)
    return max(1, math.ceil(ongoing / context.config.target_ongoing_requests)), {}
