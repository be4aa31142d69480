"""Runs `make loadtest`: starts a service unless one is named, runs Locust on it, and stops everything.

    .venv/bin/python -m loadtests.load steady --users 16 --duration 60s --model tiny

Exit status: 0; 1 requests failed, or none was answered; 2 nothing to run_locust; 3 the bill does not agree.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from rich.console import Console

from loadtests.load.scenario_list import SCENARIOS
from loadtests.load.service_under_test import SERVICE_VARIABLE
from loadtests.peers.process import free_port
from serve.deployment.local import check_free
from serve.errors import OperatorError

ROOT = Path(__file__).parents[2]
WEB_PORT = 8089
STOP_TIMEOUT_S = 90
LOG_SHOWN = 3000  # characters of the service's log, if it does not start


@contextmanager
def running_service(bases: Path, base: str, adapters: int) -> Iterator[Path]:
    """Starts a service and yields the file that describes it. Its own session keeps Ctrl-C from it."""
    with tempfile.TemporaryDirectory(prefix="bespoke-load-") as scratch:
        command = [sys.executable, "-m", "loadtests.load.own_service", "--home", scratch]
        command += ["--bases", str(bases), "--base", base, "--adapters", str(adapters)]
        log = Path(scratch, "service.log")
        with log.open("wb") as log_file:
            service = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                start_new_session=True,
            )
        try:
            assert service.stdout is not None
            if not any(line.strip() == b"ready" for line in service.stdout):
                raise OperatorError(f"The service did not start:\n{log.read_text()[-LOG_SHOWN:]}")
            yield Path(scratch, "service.json")
        finally:
            _end(service)


def _end(service: "subprocess.Popen[bytes]") -> None:
    """Closes the service's input, upon which it stops, and kills what is left of it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        descendants = psutil.Process(service.pid).children(recursive=True)
        assert service.stdin is not None
        service.stdin.close()
        try:
            service.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()
        _, alive = psutil.wait_procs(descendants, timeout=5)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def locust_command(options: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "locust", "-f", str(ROOT / "loadtests" / "locustfile.py")]
    command += ["--users", str(options.users), "--spawn-rate", str(min(options.users, 100))]
    if options.web:
        command += ["--web-host", "127.0.0.1", "--web-port", str(_web_port())]
    else:
        command += ["--headless", "--only-summary"]
    default_s = SCENARIOS[options.scenario].duration_s
    if duration := options.duration or (f"{default_s}s" if default_s else None):
        command += ["--run-time", duration]
    if options.host:
        command += ["--host", options.host]
    return command


def _web_port() -> int:
    try:
        check_free("127.0.0.1", WEB_PORT)
    except OperatorError:
        return free_port()
    return WEB_PORT


def run_locust(options: argparse.Namespace, service_file: Path | None) -> int:
    """Runs Locust on the service and returns its exit code."""
    environment = os.environ | {
        "LOADTEST_SCENARIO": options.scenario,
        "LOADTEST_RESULT": str(options.out or ROOT / "build" / f"loadtest-{options.scenario}.json"),
        "PYTHONPATH": str(ROOT),
    }
    if service_file is not None:
        environment[SERVICE_VARIABLE] = str(service_file)
    locust = subprocess.Popen(locust_command(options), cwd=ROOT, env=environment)
    # Ctrl-C reaches Locust, too. It stops its users, checks the bill and ends; this process waits for it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: locust.terminate())
    return locust.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "scenario",
        choices=SCENARIOS,
        help="; ".join(f"{name}: {scenario.about}" for name, scenario in SCENARIOS.items()),
    )
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--duration", help="As 90s, 10m, 1h30m.")
    parser.add_argument(
        "--host", help="A running service; its keys are in the environment (docs/loadtests.md)."
    )
    parser.add_argument("--model", default="tiny", help="The base that a service of its own serves.")
    parser.add_argument("--home", type=Path, default=Path(os.environ.get("BESPOKE_HOME", ".bespoke")))
    parser.add_argument("--web", action="store_true", help="Locust's page instead of a run at once.")
    parser.add_argument("--out", type=Path, help="The JSON result; default build/loadtest-SCENARIO.json.")
    options = parser.parse_args()
    console = Console(stderr=True)
    if options.host:
        return run_locust(options, None)
    base = options.home / "bases" / options.model
    if not base.exists():
        console.print(
            f"There is no base '{options.model}': bespoke base import configs/bases/{options.model}.yaml"
        )
        return 2
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # the exit stops the service, too
    try:
        with contextlib.ExitStack() as running:
            with console.status(f"starting a service with {options.model} (about a minute) …"):
                service = running_service(base.parent, options.model, SCENARIOS[options.scenario].adapters)
                service_file = running.enter_context(service)
            return run_locust(options, service_file)
    except OperatorError as error:
        console.print(str(error), style="red")
        return 2
    except KeyboardInterrupt:  # while the service was starting
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
