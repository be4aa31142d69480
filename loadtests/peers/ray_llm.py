"""Runs ray.serve.llm of Ray 2.60 as it comes, or with direct streaming behind HAProxy."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from loadtests.peers.engine import ROOT, base_dir, engine_arguments, engine_variables, settings
from loadtests.peers.environment import environment
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server
from serve.registry.validation import target_suffixes

LEAVES_OUT = (
    "No authentication, tenants, limits or metering; adapters only from object stores, "
    "so none here, and every tenant's would be listed."
)
LEAVES_OUT_DIRECT = (
    "No authentication, tenants, limits or metering, and vLLM's own routes are open; "
    "adapters from files only as a list that is read when it starts."
)
# Read when ray is imported, in every one of its processes. The first three are as in ours.
VARIABLES = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # the node's address is then 127.0.0.1
    "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0",  # it does nothing and would take the place of `loopback`
}


@contextmanager
def ray_llm(home: Path, base: str) -> Iterator[Server]:
    with _started("ray.serve.llm", home, base, {}, {}) as (url, pid):
        yield Server("ray.serve.llm", url, "none", base, pid, LEAVES_OUT)


@contextmanager
def ray_llm_direct(home: Path, base: str, adapters: Mapping[str, Path] | None = None) -> Iterator[Server]:
    """`adapters` as in `running_peer`."""
    name = "ray.serve.llm-direct"
    with _started(name, home, base, adapters or {}, {"RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}) as (
        url,
        pid,
    ):
        yield Server(name, url, "none", base, pid, LEAVES_OUT_DIRECT, tuple(adapters or ()))


def _with_overlay(python_path: str) -> str:
    """Returns a Python path with pyarrow at its end. ray.serve.llm imports it; our environment has none."""
    overlay = environment("ray-llm").parent / "lib" / "python3.11" / "site-packages"
    return os.pathsep.join(part for part in (str(ROOT), python_path, str(overlay)) if part)


def _haproxy_variables(scratch: Path) -> dict[str, str]:
    """Returns settings for files in `scratch` and free ports; by default all Rays of a machine share both."""
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(scratch / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(scratch / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(scratch / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(scratch),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(scratch / "server-state"),
    }


@contextmanager
def _started(
    name: str, home: Path, base: str, adapters: Mapping[str, Path], variables: dict[str, str]
) -> Iterator[tuple[str, int]]:
    # Short, because Unix socket paths have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as scratch:
        directory, engine, port = base_dir(home, base), settings(), free_port()
        inherited = engine_variables(engine) | VARIABLES | variables
        inherited |= {
            "RAYLLM_HOME_DIR": scratch,
            "PYTHONPATH": _with_overlay(inherited.get("PYTHONPATH", "")),
        }
        if variables:
            inherited |= _haproxy_variables(Path(scratch))
        order = {
            "port": port,
            "scratch": scratch,
            "model_id": base,
            "model_source": str(directory),
            "engine_kwargs": engine_arguments(engine, target_suffixes(directory)),
            "adapters": {adapter: str(path.resolve()) for adapter, path in adapters.items()},
        }
        command = [sys.executable, "-m", "loadtests.peers.ray_llm_process", json.dumps(order)]
        url = f"http://127.0.0.1:{port}"
        with running(name, command, inherited, directory=ROOT, url=url, model=base) as pid:
            yield url, pid
