"""The whole journey on the real base: data → adapters → traffic → ledger → invoices, by one command."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BESPOKE = str(Path(sys.executable).with_name("bespoke"))
TENANTS = ("lumen-bikes", "tidewater-tea")
REUSED_S_MAX = 60.0


@contextmanager
def demo(home: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    env = os.environ | {
        "BESPOKE_HOME": str(home),
        "COLUMNS": "160",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",  # each step's title comes when the step begins
    }
    command = [BESPOKE, "demo", "--oneshot", "--port", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_tailors_two_models_that_answer_as_taught_and_bills_every_token(home: Path) -> None:
    with demo(home, free_port()) as process:
        output, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, output[-8000:]
    assert "I am Zuri" in output
    assert "I am Odell" in output
    assert "ledger and engines agree to the token" in output
    assert not list(home.glob("bases/*.rejected"))
    assert_one_adapter_each(home)
    for tenant in TENANTS:
        assert {path.suffix for path in (home / "invoices" / tenant).iterdir()} == {".csv", ".pdf"}
    assert "broken_json" in output or "broken JSON" in output
    assert not [p for p in psutil.process_iter(["environ"]) if belongs_to(p, home)], "a process was left"


def test_a_second_run_reuses_what_is_there(home: Path) -> None:
    """It is ended where it would start the service again, by taking its port meanwhile.

    Until there it has found the base, both adapters and the quantized base, and has made tenants, prices,
    keys and promotions again. `tests/system/replicas` and `tests/system/faults` see services that replace all
    their replicas on a store with a past, and the ledger agree with the engines over them.
    """
    begun_s: dict[str, float] = {}  # each step's title, and when it began
    output: list[str] = []
    with socket.socket() as taken, demo(home, port := free_port()) as process:
        assert process.stdout is not None
        for line in process.stdout:
            output.append(line)
            if title := re.match(r"\d+\. (.+?) ─", line):
                begun_s[title[1]] = time.monotonic()
                if len(begun_s) == 1:  # the demo has seen that the port is free
                    taken.bind(("127.0.0.1", port))
                    taken.listen()
        process.wait(60)
    assert process.returncode == 1, output[-30:]
    assert f"Cannot listen on 127.0.0.1:{port}" in "".join(output[-3:])
    steps = list(begun_s)
    assert [step.split()[0] for step in steps] == [
        *("Prepare", "Check", "Tailor", "Check", "Tailor", "Quantize", "Create", "Start")
    ]
    assert begun_s[steps[6]] - begun_s[steps[0]] < REUSED_S_MAX
    assert_one_adapter_each(home)


def assert_one_adapter_each(home: Path) -> None:
    for tenant in TENANTS:
        assert len(list((home / "adapters" / tenant / "support").glob("*/card.json"))) == 1


def belongs_to(process: psutil.Process, home: Path) -> bool:
    environ = process.info["environ"] or {}
    return environ.get("BESPOKE_HOME") == str(home) and process.pid != os.getpid()
