"""The official openai client for Node against the running gateway: the contract in another language."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from serve.rate_limits.limits import Limits, LimitStore
from tests.support.constants import NOON, TENANTS, TINY
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow


def test_the_node_client_cannot_tell_the_gateway_from_openai(live: LiveService, node_folder: Path) -> None:
    key, limited = live.tenants.create_key(TENANTS[0], at=NOON)
    with live.store.write() as connection:
        limits = Limits(concurrent_requests=1)
        LimitStore(live.store).set(connection, "key", key.id, limits, at=NOON)
    environment = {
        "PATH": os.environ["PATH"],
        "BESPOKE_URL": f"{live.url}/v1",
        "BESPOKE_KEY": live.keys[TENANTS[0]],
        "BESPOKE_LIMITED_KEY": limited,
        "BESPOKE_MODEL": TINY,
        "BESPOKE_ADAPTER": f"{TENANTS[0]}/support",
    }
    done = subprocess.run(
        ["node", "contract.mjs"],
        cwd=node_folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    failed = [f"{case['name']}\n{case['error']}" for case in cases if case["error"]]
    assert not failed, "\n\n".join(failed)
    assert len(cases) == 13, done.stderr
