"""Keeps every port of Ray Serve 2.60 on loopback; Ray calls `keep_on_loopback` first in each worker.

Ray binds three kinds to every interface and has no setting for them: the replicas' gRPC ports, which
unpickle what arrives, and HAProxy's pages of statistics and metrics.
"""

from typing import Any

EVERYWHERE = ("bind *:{{ config.stats_port }}", "bind :{{ config.metrics_port }}")


def keep_on_loopback() -> None:
    from ray.serve._private import haproxy, replica

    bind = replica.add_port_to_grpc_server

    def bind_loopback(server: Any, address: str) -> int:
        return int(bind(server, address.replace("[::]:", "127.0.0.1:")))

    replica.add_port_to_grpc_server = bind_loopback
    haproxy.HAPROXY_CONFIG_TEMPLATE = on_loopback(haproxy.HAPROXY_CONFIG_TEMPLATE)


def on_loopback(template: str) -> str:
    """Returns HAProxy's configuration with its pages on loopback. Raises ValueError if it has none."""
    for line in EVERYWHERE:
        if line not in template:
            raise ValueError(f"This version of Ray has no '{line}' in HAProxy's configuration.")
        template = template.replace(line, "bind 127.0.0.1:" + line.partition(":")[2])
    return template
