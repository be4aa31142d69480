"""`make loadtest` starts a service of its own, runs, checks the bill, and leaves nothing behind."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.live_service import import_tiny_bases

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_run_starts_a_service_reconciles_and_leaves_nothing_behind(tmp_path: Path) -> None:
    import_tiny_bases(tmp_path)
    command = [sys.executable, "-m", "loadtests.load", "mixed", "--users", "4", "--duration", "5s"]
    command += ["--home", str(tmp_path), "--out", str(tmp_path / "report.json")]
    others = set(psutil.Process().children(recursive=True))
    completed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["complete"] > 0
    assert report["reconciliation"]["agrees"]
    assert set(psutil.Process().children(recursive=True)) <= others
