"""Runs a peer as a child process: starts it, checks that it stays on loopback, ends all its processes."""

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx
import psutil

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
LOG_TAIL_BYTES = 4000
LOOPBACK = ("127.", "::1", "::ffff:127.")


class PeerFailed(Exception):
    """Means that a peer did not start or listens beyond loopback. The message ends with its log's tail."""


def free_port() -> int:
    """Returns a port of 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    name: str,
    command: list[str],
    variables: Mapping[str, str],
    *,
    directory: Path,
    url: str,
    model: str,
    key: str = "none",
) -> Iterator[int]:
    """Runs `command` in `directory`. Yields its process id when it answers a chat completion for `model`.

    Raises PeerFailed if it ends or takes longer than START_TIMEOUT_S, or if one of its processes listens on
    another interface than loopback.
    """
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env=variables,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_for_answer(process, url, model, key)
            _require_loopback(process.pid)
            yield process.pid
        except PeerFailed as failure:
            raise PeerFailed(f"{name}: {failure}\n{_tail(log)}") from None
        finally:
            _end(process)


def _wait_for_answer(process: "subprocess.Popen[bytes]", url: str, model: str, key: str) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    deadline_s, last_error = time.monotonic() + START_TIMEOUT_S, "nothing"
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise PeerFailed(f"ended with status {process.returncode}")
            try:
                answer = client.post("/v1/chat/completions", json=body)
                if answer.status_code == 200:
                    return
                last_error = f"{answer.status_code} {answer.text[:500]}"
            except httpx.HTTPError as error:
                last_error = repr(error)
            time.sleep(0.25)
    raise PeerFailed(f"no chat completion within {START_TIMEOUT_S:.0f} s; the last attempt: {last_error}")


def _require_loopback(pid: int) -> None:
    exposed = set()
    for member in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in member.net_connections("inet"):
                address = connection.laddr
                if connection.status == psutil.CONN_LISTEN and not address.ip.startswith(LOOPBACK):
                    exposed.add(f"{member.name()} on {address.ip}:{address.port}")
    if exposed:
        raise PeerFailed(f"listens beyond loopback: {', '.join(sorted(exposed))}")


def family(pid: int) -> list[psutil.Process]:
    """Returns process `pid`, its descendants, and processes of its session that have lost their parent."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        descendants = {root, *root.children(recursive=True)}
        return list(descendants | set(_session(pid)))
    return _session(pid)


def _session(pid: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == pid:
                members.append(process)
    return members


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks the root to end, which ends the others in good order, and kills those that are left."""
    members = family(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    members = list({*members, *family(process.pid)})
    _, alive = psutil.wait_procs(members, timeout=5)
    for member in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(alive, timeout=10)
    process.wait(10)


def _tail(log: IO[bytes]) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
    return log.read().decode(errors="replace")
