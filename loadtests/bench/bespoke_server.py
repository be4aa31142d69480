"""Runs our server as a customer meets it.

That is `bespoke serve` with a key, limits, a price plan, an account and the customer's own adapters.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from loadtests.peers.engine import ROOT
from loadtests.peers.process import free_port, running
from loadtests.peers.server import Server
from serve.billing.ledger.ledger import Ledger
from serve.billing.pricing.plans import Prices, read_plan
from serve.registry.registry import AdapterRegistry, newest_published
from serve.settings import Settings, load_settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret

BESPOKE = "bespoke"
TENANT = "bench"
PROFILE = ROOT / "configs" / "serve" / "cpu.yaml"
LEAVES_OUT = "Nothing: a key, limits, a price, a hold and a settlement on disk for each request."
# Too high to refuse anything. They make every request pass through the limiter.
LIMITS = {"requests_per_min": 1_000_000, "tokens_per_min": 1_000_000_000, "concurrent_requests": 10_000}


@contextmanager
def bespoke_server(
    home: Path,
    base: str,
    adapters: Mapping[str, Path],
    *,
    gateway_replicas: int = 1,
    engine_replicas: int = 1,
) -> Iterator[Server]:
    """Starts `bespoke serve` and yields it when it answers.

    `adapters`: name → directory that `publish_random` wrote. They are served as `bench/NAME`.
    """
    with tempfile.TemporaryDirectory(prefix="bespoke-bench-", ignore_cleanup_errors=True) as scratch:
        own_home = Path(scratch)
        (own_home / "bases").symlink_to((home / "bases").resolve())
        settings = load_settings(PROFILE, home=own_home, port=free_port(), bases=[base])
        for name, directory in adapters.items():
            shutil.copytree(directory, settings.adapters_dir / TENANT / name / directory.name)
        key = _create_customer(settings, base, tuple(adapters))
        command = [sys.executable, "-m", "serve.cli", "serve", "--config", str(PROFILE)]
        command += ["--home", str(own_home), "--port", str(settings.port), "--base", base]
        variables = os.environ | {
            "PYTHONPATH": str(ROOT),
            "BESPOKE_GATEWAY_REPLICAS": str(gateway_replicas),
            "BESPOKE_ENGINE_REPLICAS": str(engine_replicas),
        }
        url = f"http://127.0.0.1:{settings.port}"
        with running(BESPOKE, command, variables, directory=ROOT, url=url, model=base, key=key) as pid:
            names = tuple(f"{TENANT}/{name}" for name in adapters)
            yield Server(BESPOKE, url, key, base, pid, LEAVES_OUT, names)


def _create_customer(settings: Settings, base: str, adapters: tuple[str, ...]) -> str:
    """Creates the tenant with account, plan and adapters. Returns its key."""
    now = datetime.now(UTC)
    with closing(Store(settings.store_url)) as store:
        store.migrate()
        tenants, prices = Tenants(store, server_secret(settings.home)), Prices(store)
        tenants.create(TENANT, at=now)
        tenants.change(TENANT, at=now, limits=LIMITS)
        Ledger(store).open_account(TENANT, 10**15)
        prices.publish(read_plan(ROOT / "configs" / "prices" / "standard.yaml"), at=now)
        prices.subscribe(TENANT, "standard", at=now)
        catalogue = AdapterRegistry(store, [base])
        for name in adapters:
            adapter = catalogue.register(
                newest_published(settings.adapters_dir, TENANT, name),
                at=now,
                base_dir=settings.bases_dir / base,
                max_rank=settings.engine.max_lora_rank,
            )
            catalogue.promote(adapter, at=now)
        _, secret = tenants.create_key(TENANT, at=now)
        return secret
