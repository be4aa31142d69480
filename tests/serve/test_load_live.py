"""Locust's scenarios run on the running gateway: they measure, check the bill, and notice a wrong count."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from loadtests.load.service_under_test import ModelAccess, ServiceUnderTest
from tests.support.constants import TENANTS, TINY
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LOCUSTFILE = ROOT / "loadtests" / "locustfile.py"
MISCOUNTING = ROOT / "tests" / "support" / "miscounting_locustfile.py"
LUMEN = TENANTS[0]


def billing_key(live: LiveService, tenant: str) -> str:
    _, secret = live.tenants.create_key(tenant, at=datetime.now(UTC), scopes=frozenset({"billing-read"}))
    return secret


@pytest.fixture(scope="module")
def service(live: LiveService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [ModelAccess(tenant, live.keys[tenant], f"{tenant}/support") for tenant in TENANTS]
    service = ServiceUnderTest(
        live.url,
        (*models, ModelAccess(LUMEN, live.keys[LUMEN], TINY)),
        billing_keys={tenant: billing_key(live, tenant) for tenant in TENANTS},
        store_url=live.settings.store_url,
    )
    path = tmp_path_factory.mktemp("load") / "service.json"
    service.write(path)
    return path


def run_locust(
    locustfile: Path, out: Path, *arguments: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Locust in a process of its own: it patches the one that it is in."""
    command = [sys.executable, "-m", "locust", "-f", str(locustfile), "--headless", "--only-summary"]
    command += ["--users", "6", "--spawn-rate", "6", "--run-time", "5s", *arguments]
    completed = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT), "LOADTEST_RESULT": str(out)} | environment,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=180,
        check=False,
    )
    return completed, json.loads(out.read_text())


def test_mixed_traffic_is_measured_and_its_tokens_are_the_ledgers_and_the_engines(
    service: Path, tmp_path: Path
) -> None:
    completed, report = run_locust(
        LOCUSTFILE, tmp_path / "o.json", LOADTEST_SCENARIO="mixed", LOADTEST_SERVICE=str(service)
    )
    assert completed.returncode == 0, completed.stdout
    assert report["reconciliation"]["agrees"]
    assert (
        report["reconciliation"]["checks"]["clients = ledger, by request"]
        == report["complete"] + report["left"]
    )
    stream = report["rows"]["chat stream"]
    assert stream["ttft"]["count"] == stream["complete"] > 0
    assert 0 < stream["ttft"]["p50_ms"] <= stream["request"]["most_ms"]
    assert stream["itl"]["count"] > 0
    rows = {tuple(line.split()[:3]) for line in completed.stdout.splitlines()}  # of Locust's own tables
    assert {("TTFT", "chat", "stream"), ("ITL", "chat", "stream"), ("request", "chat", "stream")} <= rows


def test_one_token_that_a_client_saw_and_nobody_billed_is_noticed_and_named(
    service: Path, tmp_path: Path
) -> None:
    completed, report = run_locust(
        MISCOUNTING, tmp_path / "o.json", LOADTEST_SCENARIO="mixed", LOADTEST_SERVICE=str(service)
    )
    assert completed.returncode == 3, completed.stdout
    named = [d for d in report["reconciliation"]["differences"] if d["who"].startswith("req_")]
    assert len(named) == 1
    assert named[0]["what"] == "completion tokens"
    assert int(named[0]["seen"]) == int(named[0]["billed"]) + 1
    assert named[0]["who"].split()[0] in completed.stdout


def test_a_service_that_runs_already_is_driven_with_its_url_and_a_key(
    live: LiveService, tmp_path: Path
) -> None:
    completed, report = run_locust(
        LOCUSTFILE,
        tmp_path / "o.json",
        *("--host", live.url),
        LOADTEST_SCENARIO="steady",
        LOADTEST_KEY=live.keys[LUMEN],
        LOADTEST_BILLING_KEY=billing_key(live, LUMEN),
        LOADTEST_MODELS=f"{LUMEN}/support,{TINY}",
    )
    assert completed.returncode == 0, completed.stdout
    assert {"clients = usage API, by tenant and model", "usage API ≤ engines"} <= set(
        report["reconciliation"]["checks"]
    )
    assert live.keys[LUMEN] not in completed.stdout + json.dumps(report)


def test_a_key_that_may_not_read_usage_is_refused_before_anything_is_asked(
    live: LiveService, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--host", live.url]
    before = live.count_events()
    completed = subprocess.run(
        [*command, "--run-time", "5s"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "LOADTEST_KEY": live.keys[LUMEN]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (completed.returncode, "billing-read" in completed.stderr) == (2, True)
    assert live.count_events() == before
