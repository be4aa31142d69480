"""Starts the servers that are measured beside each other: ours, a bare vLLM, and the peers of a group."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.bench.bespoke_server import TENANT, bespoke_server
from loadtests.bench.processes import ProcessFamily
from loadtests.peers.peer_list import PROXIES, running_peer
from loadtests.peers.server import Server
from loadtests.peers.vllm_server import AS_IT_COMES, vllm_server
from loadtests.synthetic import publish_random

# The proxies share one bare server. Each other peer brings an engine of its own; two do not fit in memory.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "pair": (),
    "proxies": tuple(PROXIES),
    "default": (AS_IT_COMES,),
    "ray": ("ray.serve.llm",),
    "ray-direct": ("ray.serve.llm-direct",),
}


@dataclass(frozen=True)
class RunningServer:
    """Joins a server with its processes.

    A proxy's processes include the bare server behind it. That one still has the prompts of its own turn in
    its prefix cache, so a proxy gets other prompts: those with another `salt`.
    """

    server: Server
    family: ProcessFamily
    salt: int

    @property
    def name(self) -> str:
        return self.server.name

    @property
    def url(self) -> str:
        return self.server.url


@contextmanager
def published_adapters(home: Path, base: str, count: int) -> Iterator[dict[str, Path]]:
    """Writes random adapters on every linear layer; every server reads the same files."""
    base_dir = (home / "bases" / base).resolve()
    with tempfile.TemporaryDirectory(prefix="bespoke-adapters-") as scratch:
        yield {
            name: publish_random(base_dir, Path(scratch), tenant=TENANT, name=name, seed=seed)
            for seed, name in enumerate(f"a{number}" for number in range(count))
        }


@contextmanager
def running_servers(
    home: Path, base: str, adapters: Mapping[str, Path], peers: tuple[str, ...]
) -> Iterator[list[RunningServer]]:
    """Yields ours first, the bare server second, then `peers`."""
    with ExitStack() as stack:
        ours = stack.enter_context(bespoke_server(home, base, adapters))
        bare = stack.enter_context(vllm_server(home, base, adapters))
        servers: list[tuple[Server, tuple[int, ...], int]] = [
            (ours, (ours.root_pid,), 0),
            (bare, (bare.root_pid,), 0),
        ]
        for number, name in enumerate(peers, start=1):
            if name in PROXIES:
                server = stack.enter_context(PROXIES[name](bare))
                servers.append((server, (server.root_pid, bare.root_pid), number))
            else:
                server = stack.enter_context(running_peer(name, home, base, adapters))
                servers.append((server, (server.root_pid,), 0))
        yield [RunningServer(server, ProcessFamily(pids), salt) for server, pids, salt in servers]
