"""vLLM's own OpenAI server, with our engine's flags: the measure of the others; proxies stand before it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtests.peers.engine import ROOT, base_dir, engine_arguments, engine_variables, settings
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server
from serve.registry.validation import target_suffixes

LEAVES_OUT = (
    "No authentication, tenants, limits or metering, every route of vLLM's is open, "
    "and the adapters are a list that is read when it starts."
)


@contextmanager
def bare(home: Path, base: str, adapters: Mapping[str, Path] | None = None) -> Iterator[Server]:
    """`adapters`: model name → directory with the adapter's files, the ones that ours serves."""
    arguments = engine_arguments(settings(), target_suffixes(base_dir(home, base)))
    variables = engine_variables(settings())
    with _started("vllm", home, base, adapters or {}, arguments, variables) as server:
        yield server


@contextmanager
def as_it_comes(home: Path, base: str, adapters: Mapping[str, Path] | None = None) -> Iterator[Server]:
    """As `bare`, but processes and threads are vLLM's own choice: on a CPU a worker beside the core."""
    arguments = engine_arguments(settings(), target_suffixes(base_dir(home, base)))
    del arguments["distributed_executor_backend"]
    variables = engine_variables(settings())
    del variables["OMP_NUM_THREADS"]
    with _started("vllm-as-it-comes", home, base, adapters or {}, arguments, variables) as server:
        yield server


@contextmanager
def _started(
    name: str,
    home: Path,
    base: str,
    adapters: Mapping[str, Path],
    arguments: dict[str, Any],
    variables: dict[str, str],
) -> Iterator[Server]:
    directory, port = base_dir(home, base), free_port()
    modules = [f"{adapter}={path.resolve()}" for adapter, path in adapters.items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", base, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--uvicorn-log-level", "warning", *flags(arguments)]
    command += ["--lora-modules", *modules] if modules else []
    url = f"http://127.0.0.1:{port}"
    with running(name, command, variables, directory=ROOT, url=url, model=base) as pid:
        yield Server(name, url, "none", base, pid, LEAVES_OUT, tuple(adapters))


def flags(arguments: dict[str, Any]) -> list[str]:
    """The command line for vLLM's arguments; a switch that is off is one that is not given."""
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
