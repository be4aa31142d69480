"""vLLM's own OpenAI server, with our engine's flags: the measure of the others; proxies stand before it."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loadtests.peers.engine import ROOT, base_dir, engine_arguments, engine_variables, settings
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server
from serve.lora_files import target_suffixes

LEAVES_OUT = (
    "No authentication, tenants, limits or metering, every route of vLLM's is open, "
    "and the adapters are a list that is read when it starts."
)


@contextmanager
def bare(home: Path, base: str, adapters: Mapping[str, Path] | None = None) -> Iterator[Server]:
    """`adapters`: model name → directory with the adapter's files, the ones that ours serves."""
    directory, engine, port = base_dir(home, base), settings(), free_port()
    modules = [f"{name}={path.resolve()}" for name, path in (adapters or {}).items()]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory)]
    command += ["--served-model-name", base, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--uvicorn-log-level", "warning"]
    command += flags(engine_arguments(engine, target_suffixes(directory)))
    command += ["--lora-modules", *modules] if modules else []
    url = f"http://127.0.0.1:{port}"
    with running("vllm", command, engine_variables(engine), directory=ROOT, url=url, model=base) as pid:
        yield Server("vllm", url, "none", base, pid, LEAVES_OUT, tuple(adapters or ()))


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
