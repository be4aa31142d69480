"""The servers that are measured beside each other: ours, a bare vLLM, and the peers of one group."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from loadtests.bench.ours import TENANT, ours
from loadtests.bench.processes import Family
from loadtests.peers.catalogue import PROXIES, peer
from loadtests.peers.server import Server
from loadtests.peers.vllm_server import bare
from loadtests.synthetic import publish_random

BARE = "vllm"
# The proxies share one bare server; the others bring an engine of their own, and two of those are too many.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "pair": (),
    "proxies": tuple(PROXIES),
    "default": ("vllm-as-it-comes",),
    "ray": ("ray.serve.llm",),
    "ray-direct": ("ray.serve.llm-direct",),
}


@dataclass(frozen=True)
class Running:
    server: Server
    family: Family  # with the server behind a proxy
    salt: int  # a proxy gets other prompts: the bare server behind it has those of its own turn in its cache

    @property
    def name(self) -> str:
        return self.server.name


@contextmanager
def published(home: Path, base: str, count: int) -> Iterator[dict[str, Path]]:
    """Random adapters on every linear layer, the same files for every server."""
    base_dir = (home / "bases" / base).resolve()
    with tempfile.TemporaryDirectory(prefix="bespoke-adapters-") as scratch:
        yield {
            name: publish_random(base_dir, Path(scratch), tenant=TENANT, name=name, seed=seed)
            for seed, name in enumerate(f"a{number}" for number in range(count))
        }


@contextmanager
def started(
    home: Path, base: str, adapters: Mapping[str, Path], peers: tuple[str, ...]
) -> Iterator[list[Running]]:
    """Ours first, the bare server second, then `peers`."""
    with ExitStack() as stack:
        mine = stack.enter_context(ours(home, base, adapters))
        theirs = stack.enter_context(bare(home, base, adapters))
        servers: list[tuple[Server, tuple[int, ...], int]] = [
            (mine, (mine.root_pid,), 0),
            (theirs, (theirs.root_pid,), 0),
        ]
        for number, name in enumerate(peers, start=1):
            if name in PROXIES:
                server = stack.enter_context(PROXIES[name](theirs))
                servers.append((server, (server.root_pid, theirs.root_pid), number))
            else:
                server = stack.enter_context(peer(name, home, base, adapters))
                servers.append((server, (server.root_pid,), 0))
        yield [Running(server, Family(pids), salt) for server, pids, salt in servers]
