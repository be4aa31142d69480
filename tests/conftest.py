"""Settings of the whole suite: the same examples in every run, and no deadline on a busy machine.

One PostgreSQL serves all tests that want it. Each unit test gets a fresh store.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, settings

from serve.billing.ledger.ledger import Ledger
from serve.billing.pricing.plans import Prices
from serve.storage.database import Store
from serve.tenants import Principal, Tenants, server_secret
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN
from tests.support.databases import NewDatabase
from tests.support.postgres import MigratedDatabases, Postgres

# Prints the minutes of each folder at the end, and writes docs/compatibility.md when it is asked to.
pytest_plugins = ["tests.support.durations", "tests.support.compatibility"]

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
    """The server is shared: a test that kills it starts it again."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def migrated_databases(postgres: Postgres) -> MigratedDatabases:
    return MigratedDatabases(postgres)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "ledger.db"
    with closing(Store(f"sqlite:///{path}")) as store:
        store.migrate()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """Makes a migrated database at each call and gives its URL. The same tests run on both dialects."""
    if request.param == "postgresql":
        databases: MigratedDatabases = request.getfixturevalue("migrated_databases")
        return databases.borrow
    migrated: Path = request.getfixturevalue("migrated_sqlite")

    @contextmanager
    def copy() -> Iterator[str]:
        with TemporaryDirectory(dir=tmp_path) as folder:
            yield f"sqlite:///{shutil.copy(migrated, folder)}"

    return copy


@pytest.fixture
def app_on_both(new_database: NewDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An app that the test builds has its store where `store` would be."""
    with new_database() as url:
        monkeypatch.setenv("BESPOKE_DATABASE_URL", url)
        yield


@pytest.fixture
def store(new_database: NewDatabase) -> Iterator[Store]:
    with new_database() as url, closing(Store(url)) as store:
        yield store


@pytest.fixture
def shop(store: Store, tmp_path: Path) -> BillingFixture:
    tenants = Tenants(store, server_secret(tmp_path))
    tenants.create("acme", at=NOON)
    key, secret = tenants.create_key("acme", at=NOON)
    prices = Prices(store)
    price = prices.publish(PLAN, at=NOON)
    prices.subscribe("acme", PLAN.name, at=NOON)
    ledger = Ledger(store)
    ledger.open_account("acme", 1_000_000_000)
    return BillingFixture(store, tenants, ledger, Principal("acme", key.id, key.scopes), secret, price)
