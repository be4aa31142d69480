"""One real gateway with real engines for tests of behaviour; a base and a loop for those of one engine."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest

from serve.registry.registry import AdapterRegistry, newest_published
from serve.settings import EngineSettings, Settings
from serve.storage.database import Store
from tests.support.billing_fixture import onboard
from tests.support.constants import CONFIGS, MINILM, TENANTS, TINY, TINY_TWO
from tests.support.engine_host import EventLoopThread
from tests.support.live_service import (
    LiveService,
    import_embedding_base,
    import_tiny_bases,
    register_and_promote,
)
from tests.support.ports import free_port


@pytest.fixture(scope="package")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State with the tiny base and one tiny adapter per tenant, made by the real pipeline."""
    from finetune.job import load_job, run

    home = tmp_path_factory.mktemp("home")
    import_tiny_bases(home)
    import_embedding_base(home)
    for tenant in TENANTS:
        job = load_job(CONFIGS / "demo" / f"{tenant}.yaml")
        # One epoch is enough for the gate, and whether answers are as taught is the demo's test.
        recipe = job.recipe.model_copy(update={"top_layers": None, "epochs": 1})
        tiny = job.model_copy(update={"base": TINY, "recipe": recipe})
        run(tiny, bases=home / "bases", adapters=home / "adapters")
    return home


@pytest.fixture(scope="package")
def live(home: Path) -> Iterator[LiveService]:
    """Three gateways and three engines for all tests of this folder, on a free port."""
    from serve.deployment.local import LocalService

    settings = Settings(
        home=home,
        port=free_port(),
        bases=[TINY, TINY_TWO, MINILM],
        gateway_replicas=3,  # so that nothing works only where it was begun
        accept_timeout_s=15,
        # Two slots for two adapters and the base: the batches in which vLLM's CPU LoRA mixes customers up.
        engine=EngineSettings(dtype="float32", max_model_len=1024, max_loras=2, enforce_eager=True),
    )
    with closing(Store(settings.store_url)) as store:
        keys = onboard(store, home, TENANTS)
        for tenant in TENANTS:
            registry = AdapterRegistry(store, settings.bases)
            register_and_promote(registry, newest_published(settings.adapters_dir, tenant, "support"), home)
        with LocalService(settings) as service:
            metrics = httpx.get(f"{service.url}/metrics", timeout=60).text.splitlines()
            yield LiveService(service.url, settings, store, keys, metrics_at_start=tuple(metrics))


@pytest.fixture(scope="package")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from quantize.base_import import import_base
    from quantize.config import BaseConfig, read_config

    config = read_config(CONFIGS / "bases" / "tiny.yaml", BaseConfig)
    return import_base(config, tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="package")
def loop() -> Iterator[EventLoopThread]:
    loop = EventLoopThread()
    yield loop
    loop.close()
