"""Settings of the whole suite: the same examples in every run, and no deadline on a busy machine.
One PostgreSQL for all tests that want it."""

import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support.postgres import MigratedDatabases, Postgres

# `serve.deployment.ray_app` sets this before it imports ray; here a test that runs vLLM may import ray first.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

# Some images forbid Python to keep what it compiled. Each of the hundreds of processes that these tests
# start would compile all its imports again: 10 s of a vLLM process's 17, and an engine is three of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Others use it, too: who kills it starts it again."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_databases(postgres: Postgres) -> MigratedDatabases:
    return MigratedDatabases(postgres)
