"""The port that the service will listen on."""

import socket

from serve.errors import OperatorError


def check_free(host: str, port: int) -> None:
    """Raises OperatorError, with the reason, if nothing can listen on `host`:`port` now."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise OperatorError(f"Cannot listen on {host}:{port}: {error.strerror}.") from error
