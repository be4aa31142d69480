"""Unit tests get a fresh store; tests of behaviour share one real gateway with a real engine."""

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import openai
import pytest
import sqlalchemy as sa

from serve.billing.ledger.ledger import Ledger
from serve.billing.metering.events import usage_table
from serve.billing.pricing.plans import PricePlan, Prices, PriceVersion, Rates
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import AdapterVersion
from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from serve.tenants import Principal, Tenants, server_secret
from tests.support.postgres import MigratedDatabases

NOON = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CONFIGS = Path(__file__).parents[2] / "configs"
TINY, TINY_TWO = "tiny", "other-tiny"
TENANTS = ("lumen-bikes", "tidewater-tea")

RATES = Rates(
    prompt_nanos_per_mtok=100_000_000,
    cached_prompt_nanos_per_mtok=50_000_000,
    completion_nanos_per_mtok=400_000_000,
)
PLAN = PricePlan(name="standard", currency="USD", base=RATES, adapter=RATES)


NewDatabase = Callable[[], AbstractContextManager[str]]

# For tests of what only SQLite does, and for those that would only say the same again, slower.
on_sqlite = pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sqlite") / "ledger.db"
    with closing(Store(f"sqlite:///{path}")) as store:
        store.migrate()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def new_database(request: pytest.FixtureRequest, tmp_path: Path) -> NewDatabase:
    """Makes a migrated database on each call, and returns its URL. The tests run on both kinds."""
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


@dataclass(frozen=True)
class BillingFixture:
    """A store with one tenant that may buy."""

    store: Store
    tenants: Tenants
    ledger: Ledger
    principal: Principal
    secret: str
    price: PriceVersion


@pytest.fixture
def shop(store: Store, tmp_path: Path) -> BillingFixture:
    tenants = Tenants(store, server_secret(tmp_path))
    tenants.create("acme", at=NOON)
    key, secret = tenants.create_key("acme", at=NOON)
    prices = Prices(store)
    price = prices.publish(PLAN, at=NOON)
    prices.subscribe("acme", "standard", at=NOON)
    ledger = Ledger(store)
    ledger.open_account("acme", 1_000_000_000)
    return BillingFixture(store, tenants, ledger, Principal("acme", key.id, key.scopes), secret, price)


def wait_until(condition: Callable[[], bool], timeout_s: float = 60, interval_s: float = 0.05) -> None:
    """Fails the test if `condition` does not come true in time."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(interval_s)


@dataclass(frozen=True)
class Live:
    """The running gateway, as its users see it, and its store, as its operator sees it."""

    url: str
    settings: Settings
    store: Store
    keys: dict[str, str]
    metrics_at_start: tuple[str, ...] = field(default=(), kw_only=True)

    def client(self, tenant: str = TENANTS[0]) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[tenant], max_retries=0, timeout=120)

    def post(self, body: object, *, tenant: str = TENANTS[0], **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            content=content,
            headers={"Authorization": f"Bearer {self.keys[tenant]}"} | headers,
            timeout=120,
        )

    @property
    def tenants(self) -> Tenants:
        return Tenants(self.store, server_secret(self.settings.home))

    def wait_idle(self) -> None:
        wait_until(lambda: not Ledger(self.store).open_holds())

    def last_event(self) -> dict[str, object]:
        query = sa.select(usage_table).order_by(usage_table.c.id.desc()).limit(1)
        with self.store.read() as connection:
            return dict(connection.execute(query).mappings().one())

    def count_events(self) -> int:
        with self.store.read() as connection:
            return connection.execute(sa.select(sa.func.count()).select_from(usage_table)).scalar_one()


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State with the tiny base and one tiny adapter per tenant, made by the real pipeline."""
    from finetune.job import load_job, run

    home = tmp_path_factory.mktemp("home")
    import_tiny(home)
    for tenant in TENANTS:
        job = load_job(CONFIGS / "demo" / f"{tenant}.yaml")
        # One epoch is enough for the gate, and whether answers are as taught is the demo's test.
        recipe = job.recipe.model_copy(update={"top_layers": None, "epochs": 1})
        tiny = job.model_copy(update={"base": TINY, "recipe": recipe})
        run(tiny, bases=home / "bases", adapters=home / "adapters")
    return home


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def import_tiny(home: Path) -> None:
    from quantize.base_import import import_base
    from quantize.config import BaseConfig, read_config

    spec = read_config(CONFIGS / "bases" / "tiny.yaml", BaseConfig)
    import_base(spec, home / "bases")
    assert spec.random_llama is not None
    other = spec.random_llama.model_copy(update={"seed": 1})
    import_base(spec.model_copy(update={"name": TINY_TWO, "random_llama": other}), home / "bases")


def onboard(store: Store, home: Path, names: Iterable[str]) -> dict[str, str]:
    """Tenants that may buy, in a new store; a key of each."""
    store.migrate()
    tenants, prices, keys = Tenants(store, server_secret(home)), Prices(store), {}
    prices.publish(PLAN, at=NOON)
    for tenant in names:
        tenants.create(tenant, at=NOON)
        Ledger(store).open_account(tenant, 10**12)
        prices.subscribe(tenant, PLAN.name, at=NOON)
        _, keys[tenant] = tenants.create_key(tenant, at=NOON, scopes=frozenset({"inference", "files"}))
    return keys


def enter(registry: AdapterRegistry, directory: Path, home: Path) -> AdapterVersion:
    """Register and promote what is published in `directory`, as `bespoke adapter promote` does."""
    adapter = registry.register(directory, at=NOON, base_dir=home / "bases" / TINY, max_rank=16)
    registry.promote(adapter, at=NOON)
    return adapter


@pytest.fixture(scope="package")
def live(home: Path) -> Iterator[Live]:
    """One gateway and one engine for all tests of this folder, on a free port."""
    from serve.deployment.local import LocalService
    from serve.registry.registry import newest_published

    settings = Settings(
        home=home,
        port=free_port(),
        bases=[TINY, TINY_TWO],
        gateway_replicas=3,  # so that nothing works only where it was begun
        accept_timeout_s=15,
        # Two slots for two adapters and the base: the batches in which vLLM's CPU LoRA mixes customers up.
        engine=EngineSettings(dtype="float32", max_model_len=1024, max_loras=2, enforce_eager=True),
    )
    store = Store(settings.store_url)
    keys = onboard(store, home, TENANTS)
    for tenant in TENANTS:
        registry = AdapterRegistry(store, settings.bases)
        enter(registry, newest_published(settings.adapters_dir, tenant, "support"), home)
    with LocalService(settings) as service:
        metrics = httpx.get(f"{service.url}/metrics", timeout=60).text.splitlines()
        yield Live(service.url, settings, store, keys, metrics_at_start=tuple(metrics))
    store.close()
