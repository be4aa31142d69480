"""Checks the places in Ray and uvicorn that `serve.deployment.upstream` relies on.

A test that fails here after an upgrade names a reach to look at again; docs/upstream.md says how.
"""

import ast
import asyncio
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serve.deployment import upstream
from serve.deployment.upstream import BoundedHttpProtocol


class Transport(asyncio.Transport):
    """Records whether it was closed, and sends nothing."""

    closed = False

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def write(self, data: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 1000

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default


async def nothing(_scope: Any, _receive: Any, _send: Any) -> None:
    await asyncio.Event().wait()


def connect(kind: type[HttpToolsProtocol]) -> tuple[HttpToolsProtocol, Transport]:
    """Opens a connection of uvicorn's to a client, within a running loop."""
    config = uvicorn.Config(nothing, lifespan="off", log_config=None)
    config.load()
    protocol, transport = kind(config, ServerState(), {}), Transport()
    protocol.connection_made(transport)
    return protocol, transport


def closes(kind: type[HttpToolsProtocol], monkeypatch: pytest.MonkeyPatch, *, case: str) -> bool:
    """Finds out whether a server of `kind` ends the connection of such a client."""
    monkeypatch.setattr(upstream, "HEADERS_TIMEOUT_S", 0.01)
    monkeypatch.setattr(upstream, "STALLED_S", 0.01)

    async def scenario() -> bool:
        protocol, transport = connect(kind)
        if case == "endless headers":
            protocol.data_received(b"GET / HTTP/1.1\r\n")
            for number in range(40):
                protocol.data_received(b"x-%d: %s\r\n" % (number, b"a" * 2000))
            return transport.closed
        if case == "no headers":
            protocol.data_received(b"GET / HT")
        if case == "reads no more":
            protocol.data_received(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
            protocol.pause_writing()
        await asyncio.sleep(0.05)
        for task in protocol.tasks:
            task.cancel()
        return transport.closed

    return asyncio.run(scenario())


@pytest.mark.parametrize("case", ["endless headers", "no headers", "reads no more"])
def test_uvicorn_alone_still_waits_without_a_limit_and_ours_does_not(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert closes(BoundedHttpProtocol, monkeypatch, case=case)
    assert not closes(HttpToolsProtocol, monkeypatch, case=case), "uvicorn does it itself: ours can go"


def test_uvicorn_has_no_time_out_that_we_do_not_know() -> None:
    names = {name for name in inspect.signature(uvicorn.Config).parameters if name.startswith("timeout_")}
    assert names == {
        *("timeout_keep_alive", "timeout_notify"),
        *("timeout_graceful_shutdown", "timeout_worker_healthcheck"),
    }, "a new one may replace BoundedHttpProtocol"


def test_uvicorn_counts_its_requests_where_we_read_them() -> None:
    server = uvicorn.Server(uvicorn.Config(nothing))
    assert server.server_state.tasks == set()
    assert upstream.ongoing_requests(server) == 0


def test_ray_still_binds_its_replica_port_to_every_interface() -> None:
    from ray.serve._private import replica

    source = inspect.getsource(replica)
    assert source.count('add_port_to_grpc_server(self._server, "[::]:0")') == 1, "Ray binds it elsewhere now"


def test_the_replica_port_is_bound_to_loopback_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private import replica

    addresses: list[str] = []

    def bind(_server: object, address: str) -> int:
        addresses.append(address)
        return 1

    bind.__module__ = "ray._common.tls_utils"
    monkeypatch.setattr(replica, "add_port_to_grpc_server", bind)
    upstream.keep_replica_port_on_loopback()
    bind_loopback = replica.add_port_to_grpc_server
    upstream.keep_replica_port_on_loopback()
    assert replica.add_port_to_grpc_server is bind_loopback
    assert replica.add_port_to_grpc_server(object(), "[::]:0") == 1
    assert addresses == ["127.0.0.1:0"]


def test_ray_still_reads_the_variables_that_we_set() -> None:
    """Ray's source must hold each name. `RAY_worker_niceness` is also read in C++."""
    import ray

    source = b"".join(
        (Path(ray.__file__).parent / name).read_bytes()
        for name in (
            "_private/ray_constants.py",
            "_private/accelerators/accelerator.py",
            "_common/usage/usage_constants.py",
            "serve/_private/constants.py",
        )
    )
    assert [name for name in upstream.RAY_VARIABLES if name.encode() not in source] == []


def test_ray_still_takes_its_folder_as_an_argument() -> None:
    import ray

    (name,) = upstream.ray_folder(Path("x"))
    assert f'"{name}"' in inspect.getsource(inspect.unwrap(ray.init))


@pytest.mark.parametrize("niceness", [None, "7"])
def test_ray_is_imported_after_its_variables_are_set_and_an_operators_own_stand(niceness: str | None) -> None:
    program = (
        "import os, sys; from serve.deployment import upstream; assert 'ray' not in sys.modules;"
        "import serve.deployment.ray_app; assert 'ray' in sys.modules;"
        "print([os.environ[name] for name in upstream.RAY_VARIABLES])"
    )
    inherited = {name: value for name, value in os.environ.items() if name not in upstream.RAY_VARIABLES}
    own = {} if niceness is None else {"RAY_worker_niceness": niceness}
    output = subprocess.run(
        [sys.executable, "-c", program], env=inherited | own, capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == str(list((upstream.RAY_VARIABLES | own).values()))


PUBLIC = {
    *("ray", "ray.serve", "ray.serve.config", "ray.serve.exceptions", "ray.serve.schema"),
    *("uvicorn", "vllm", "vllm.exceptions", "vllm.lora.request"),
}


def test_only_the_upstream_modules_import_internals() -> None:
    root = Path(upstream.__file__).parents[1]
    internal = []
    for path in root.rglob("*.py"):
        if path.name == "upstream.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                modules = [node.module]
            internal += [
                f"{path.relative_to(root)}: {module}"
                for module in modules
                if module.partition(".")[0] in ("ray", "uvicorn", "vllm") and module not in PUBLIC
            ]
    assert internal == [], "a reach like that belongs into an upstream module, with its reason and a test"
