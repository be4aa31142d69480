"""Lists the peers by name and starts one of them alone."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from loadtests.peers.litellm import litellm
from loadtests.peers.ray_llm import ray_llm, ray_llm_direct
from loadtests.peers.server import Server
from loadtests.peers.vllm_router import vllm_router
from loadtests.peers.vllm_server import AS_IT_COMES, BARE, vllm_server

# A proxy stands in front of a bare server, which several proxies may share.
PROXIES: Mapping[str, Callable[[Server], AbstractContextManager[Server]]] = {
    "litellm": litellm,
    "vllm-router": vllm_router,
}
PEERS = (BARE, AS_IT_COMES, "ray.serve.llm", "ray.serve.llm-direct", *PROXIES)


@contextmanager
def running_peer(
    name: str, home: Path, base: str, adapters: Mapping[str, Path] | None = None
) -> Iterator[Server]:
    """Starts the peer called `name`, and the bare server behind it if it is a proxy.

    `adapters`: model name → directory with the adapter's files, the same that our server serves.
    """
    if name in PROXIES:
        with vllm_server(home, base, adapters) as upstream, PROXIES[name](upstream) as server:
            yield server
    elif name in (BARE, AS_IT_COMES):
        with vllm_server(home, base, adapters, as_it_comes=name == AS_IT_COMES) as server:
            yield server
    elif name == "ray.serve.llm":
        with ray_llm(home, base) as server:
            yield server
    else:
        with ray_llm_direct(home, base, adapters) as server:
            yield server
