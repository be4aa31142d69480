"""The whole journey on the real base: data → adapters → traffic → ledger → invoices, by one command."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

BESPOKE = str(Path(sys.executable).with_name("bespoke"))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def run_demo(home: Path) -> str:
    env = os.environ | {"BESPOKE_HOME": str(home), "COLUMNS": "160", "NO_COLOR": "1"}
    command = [BESPOKE, "demo", "--oneshot", "--port", free_port()]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demo_tailors_two_models_that_answer_as_taught_and_bills_every_token(home: Path) -> None:
    said = run_demo(home)
    assert "I am Zuri" in said
    assert "I am Odell" in said
    assert "ledger and engines agree to the token" in said
    assert not list(home.glob("bases/*.rejected"))
    for tenant in ("lumen-bikes", "tidewater-tea"):
        assert len(list((home / "adapters" / tenant / "support").glob("*/card.json"))) == 1
        assert {path.suffix for path in (home / "invoices" / tenant).iterdir()} == {".csv", ".pdf"}
    assert "broken_json" in said or "broken JSON" in said
    assert not [p for p in psutil.process_iter(["environ"]) if belongs_to(p, home)], "a process was left"


def test_a_second_run_reuses_what_is_there(home: Path) -> None:
    said = run_demo(home)
    assert "ledger and engines agree to the token" in said
    seconds = re.findall(r"^(.+?) {2,}([\d.]+)$", said, re.MULTILINE)
    before_serving = [
        float(time) for step, time in seconds if re.match(r"Prepare|Check|Tailor|Quantize", step)
    ]
    assert len(before_serving) == 6
    assert sum(before_serving) < 60
    for tenant in ("lumen-bikes", "tidewater-tea"):
        assert len(list((home / "adapters" / tenant / "support").glob("*/card.json"))) == 1


def belongs_to(process: psutil.Process, home: Path) -> bool:
    environ = process.info["environ"] or {}
    return environ.get("BESPOKE_HOME") == str(home) and process.pid != os.getpid()
