"""Runs vLLM's own OpenAI server: the baseline of the bench, and the server behind the proxies."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtests.peers.engine import ROOT, base_dir, engine_arguments, engine_variables, settings
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server
from serve.registry.validation import target_suffixes

BARE, AS_IT_COMES = "vllm", "vllm-as-it-comes"
LEAVES_OUT = (
    "No authentication, tenants, limits or metering, every route of vLLM's is open, "
    "and the adapters are a list that is read when it starts."
)


@contextmanager
def vllm_server(
    home: Path, base: str, adapters: Mapping[str, Path] | None = None, *, as_it_comes: bool = False
) -> Iterator[Server]:
    """Runs a bare vLLM with our engine's arguments. `adapters` as in `running_peer`.

    `as_it_comes` leaves the executor and the number of threads to vLLM, which on a CPU starts a worker
    process beside the engine core.
    """
    name, directory, port = AS_IT_COMES if as_it_comes else BARE, base_dir(home, base), free_port()
    arguments = engine_arguments(settings(), target_suffixes(directory))
    variables = engine_variables(settings())
    if as_it_comes:
        del arguments["distributed_executor_backend"], variables["OMP_NUM_THREADS"]
    modules = [f"{adapter}={path.resolve()}" for adapter, path in (adapters or {}).items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", base, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--uvicorn-log-level", "warning", *flags(arguments)]
    command += ["--lora-modules", *modules] if modules else []
    url = f"http://127.0.0.1:{port}"
    with running(name, command, variables, directory=ROOT, url=url, model=base) as pid:
        yield Server(name, url, "none", base, pid, LEAVES_OUT, tuple(adapters or ()))


def flags(arguments: dict[str, Any]) -> list[str]:
    """Returns the command line for vLLM's arguments. A switch that is off is left out."""
    parts: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            parts += [f"--{flag}"] if value else []
        elif isinstance(value, list):
            parts += [f"--{flag}", *value]
        else:
            parts += [f"--{flag}", str(value)]
    return parts
