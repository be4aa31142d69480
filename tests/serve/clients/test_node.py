"""Clients for Node against the running gateway: OpenAI's, Anthropic's, the AI SDK with its own defaults."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.rate_limits.limits import Limits, LimitStore
from tests.support.compatibility import FAILS, MARK, WORKS
from tests.support.constants import NOON, TENANTS, TINY
from tests.support.live_service import LiveService

pytestmark = pytest.mark.slow

Record = Callable[[str, object], None]


def cases(live: LiveService, folder: Path, script: str, **more: str) -> Iterator[tuple[str, str | None]]:
    """Runs the script, and yields each case's name with its error."""
    environment = {
        "PATH": os.environ["PATH"],
        "BESPOKE_URL": f"{live.url}/v1",
        "BESPOKE_KEY": live.keys[TENANTS[0]],
        "BESPOKE_MODEL": TINY,
        "BESPOKE_ADAPTER": f"{TENANTS[0]}/support",
    }
    done = subprocess.run(
        ["node", script],
        cwd=folder,
        env=environment | more,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        case = json.loads(line)
        yield case["name"], case["error"]


def judge(record: Record, results: list[tuple[str, str, str | None]], count: int) -> None:
    """Fails for each case with an error, and if a case is missing."""
    for client, feature, error in results:
        record(MARK, (client, feature, FAILS if error else WORKS))
    failed = [f"{client}: {feature}\n{error}" for client, feature, error in results if error]
    assert not failed, "\n\n".join(failed)
    assert len(results) == count


def test_the_node_client_cannot_tell_the_gateway_from_openai(
    live: LiveService, node_folder: Path, record_property: Record
) -> None:
    key, limited = live.tenants.create_key(TENANTS[0], at=NOON)
    with live.store.write() as connection:
        limits = Limits(concurrent_requests=1)
        LimitStore(live.store).set(connection, "key", key.id, limits, at=NOON)
    results = [
        ("OpenAI (Node)", name.partition("; ")[0], error)
        for name, error in cases(live, node_folder, "contract.mjs", BESPOKE_LIMITED_KEY=limited)
    ]
    judge(record_property, results, 13)


def test_the_ai_sdk_works_with_its_default_providers(
    live: LiveService, node_folder: Path, record_property: Record
) -> None:
    """Its second turns name our items, its lengths are its own, and its tools may be OpenAI's."""
    named = [(*name.split("; "), error) for name, error in cases(live, node_folder, "ai_sdk.mjs")]
    judge(record_property, [(client, feature, error) for client, feature, error in named], 16)
