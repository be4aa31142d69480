"""Asks Ray Serve which processes run a deployment's replicas, for tests that start Ray themselves.

Serve has no public way to a replica's process. This one is what Ray's dashboard reads.
"""

from typing import Any

import psutil


def live_replicas(deployment: str) -> list[dict[str, Any]]:
    """The replicas of `deployment` that have a living process, with their "pid", "state" and "replica_id".

    A replica whose process is not started yet has no "pid" at all.
    """
    from ray.serve.context import _get_global_client

    details = _get_global_client().get_serve_details()
    replicas = details["applications"]["bespoke"]["deployments"][deployment]["replicas"]
    return [replica for replica in replicas if replica.get("pid") and psutil.pid_exists(replica["pid"])]
