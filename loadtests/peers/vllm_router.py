"""Runs vllm-router 0.1.17, the vLLM project's router in Rust, in front of another server."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtests.peers.environment import environment, isolated_variables
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server

LEAVES_OUT = (
    "Routing only: no authentication, tenants, limits per customer or metering; "
    "the request's body goes on to an engine as it came."
)


@contextmanager
def vllm_router(upstream: Server) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="peer-") as scratch:
        port, metrics = free_port(), free_port()
        command = [str(environment("vllm-router") / "vllm-router"), "--worker-urls", upstream.url]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--policy",
            "round_robin",
            "--log-level",
            "error",
        ]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
        variables, url = isolated_variables(Path(scratch)), f"http://127.0.0.1:{port}"
        with running(
            "vllm-router", command, variables, directory=Path(scratch), url=url, model=upstream.model
        ) as pid:
            yield Server("vllm-router", url, "none", upstream.model, pid, LEAVES_OUT, upstream.adapters)
