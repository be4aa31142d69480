"""The peers by name, each ready to be started alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from loadtests.peers.litellm import litellm
from loadtests.peers.ray_llm import ray_llm, ray_llm_direct
from loadtests.peers.server import Server
from loadtests.peers.vllm_router import vllm_router
from loadtests.peers.vllm_server import as_it_comes, bare

# They stand in front of a bare server, which several may share.
PROXIES: Mapping[str, Callable[[Server], AbstractContextManager[Server]]] = {
    "litellm": litellm,
    "vllm-router": vllm_router,
}
NAMES = ("vllm", "vllm-as-it-comes", "ray.serve.llm", "ray.serve.llm-direct", *PROXIES)


@contextmanager
def peer(name: str, home: Path, base: str, adapters: Mapping[str, Path] | None = None) -> Iterator[Server]:
    """The peer called `name`, with what it needs behind it; `adapters` as in `bare`."""
    if name in PROXIES:
        with bare(home, base, adapters) as upstream, PROXIES[name](upstream) as server:
            yield server
    elif name == "vllm":
        with bare(home, base, adapters) as server:
            yield server
    elif name == "vllm-as-it-comes":
        with as_it_comes(home, base, adapters) as server:
            yield server
    elif name == "ray.serve.llm":
        with ray_llm(home, base) as server:
            yield server
    else:
        with ray_llm_direct(home, base, adapters) as server:
            yield server
