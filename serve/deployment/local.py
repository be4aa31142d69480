"""A whole Bespoke on this machine, as one object that is entered and left.

It starts a private, loopback-only Ray in this process's children, and ends all of it again.

The port that the service will listen on.
"""

import socket

# First: it tells Ray where to listen, and must do so before anything imports ray.
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
    """A running Bespoke on this machine: `with Service(settings) as service: service.url`."""

    def __init__(self, settings: Settings) -> None:
        # Replicas have working directories of their own.
        self._settings = settings.model_copy(update={"home": settings.home.resolve()})
        self._scratch: Path | None = None
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
        # Short, because Unix socket paths have at most 107 bytes; private, because they are doors.
        self._scratch = Path(tempfile.mkdtemp(prefix="bespoke-"))
        os.environ[SOCKETS_VARIABLE] = str(self._scratch)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        others = psutil.Process().children(recursive=True)
        try:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"worker_process_setup_hook": "serve.deployment.event_loop.use_uvloop"},
                **ray_folder(self._scratch),
            )
        finally:  # even what a start that failed has left
            self._children = [one for one in psutil.Process().children(recursive=True) if one not in others]
        _check_node_on(settings.host)
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
        ray_serve.start(proxy_location="Disabled", logging_config=quiet)
        ray_serve.run(build(settings), name=APP_NAME, route_prefix=None, logging_config=quiet)

    def stop(self) -> None:
        """End every process that this service started; what does not go by itself is killed."""
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
        if self._scratch is not None:
            # An engine that this process starts later must not look for its sockets where nothing is.
            os.environ.pop(SOCKETS_VARIABLE, None)
            shutil.rmtree(self._scratch, ignore_errors=True)


def _check_node_on(host: str) -> None:
    """Raises OperatorError if Ray's own ports would be reachable although the service is on loopback.

    So it is if ray was imported before `serve.deployment.ray_app` could tell it where to listen.
    """
    address = ray.util.get_node_ip_address()
    if host in LOOPBACK and address not in LOOPBACK:
        raise OperatorError(
            f"Ray listens on {address}: serve.deployment.ray_app must be imported before ray."
        )
