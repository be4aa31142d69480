"""Runs a whole Bespoke on this machine, as an object that is entered and left.

It starts a private, loopback-only Ray in child processes, and ends all of it again.
"""

import socket

# First: it sets Ray's variables, which must happen before anything imports ray.
from serve.deployment.ray_app import APP_NAME, build
from serve.errors import OperatorError

# isort: split
import contextlib
import logging
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

import psutil
import ray
from ray import serve as ray_serve
from ray.serve.schema import LoggingConfig

from serve.deployment.app import LOOPBACK
from serve.deployment.upstream import ray_folder
from serve.settings import Settings


def check_free(host: str, port: int) -> None:
    """Raises OperatorError, with the reason, if nothing can listen on `host`:`port` now."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise OperatorError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error


SOCKETS_VARIABLE = "VLLM_RPC_BASE_PATH"


class LocalService:
    """Runs Bespoke within a block: `with LocalService(settings) as service: service.url`."""

    def __init__(self, settings: Settings) -> None:
        # Replicas have working directories of their own.
        self._settings = settings.model_copy(update={"home": settings.home.resolve()})
        self._folder: Path | None = None
        self._children: list[psutil.Process] = []

    @property
    def url(self) -> str:
        return f"http://{self._settings.host}:{self._settings.port}"

    def __enter__(self) -> "LocalService":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        settings = self._settings
        check_free(settings.host, settings.port)
        # Short, because Unix socket paths have at most 107 bytes. Private, because sockets are a way in.
        self._folder = Path(tempfile.mkdtemp(prefix="bespoke-"))
        os.environ[SOCKETS_VARIABLE] = str(self._folder)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        existing = psutil.Process().children(recursive=True)
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"worker_process_setup_hook": "serve.deployment.event_loop.use_uvloop"},
                **ray_folder(self._folder),
            )
        finally:  # also what a failed start has left
            self._children = [
                child for child in psutil.Process().children(recursive=True) if child not in existing
            ]
        _check_node_on(settings.host)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        ray_serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)

    def stop(self) -> None:
        """Ends every process that this service started. It kills those that do not end by themselves."""
        for process in tuple(self._children):
            with contextlib.suppress(psutil.NoSuchProcess):
                self._children += process.children(recursive=True)
        if ray.is_initialized():
            with contextlib.suppress(Exception):
                ray_serve.delete(APP_NAME)
            ray.shutdown()
        _, alive = psutil.wait_procs(self._children, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        if self._folder is not None:
            # An engine that this process starts later must not look for its sockets in a removed folder.
            os.environ.pop(SOCKETS_VARIABLE, None)
            shutil.rmtree(self._folder, ignore_errors=True)


def _check_node_on(host: str) -> None:
    """Raises OperatorError if Ray's own ports would be reachable although the service is on loopback.

    This happens if ray was imported before `serve.deployment.ray_app`, which sets the address.
    """
    address = ray.util.get_node_ip_address()
    if host in LOOPBACK and address not in LOOPBACK:
        raise OperatorError(
            f"Ray listens on {address}: serve.deployment.ray_app must be imported before ray."
        )
