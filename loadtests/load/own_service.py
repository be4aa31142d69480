"""Runs a service for one load test in a process of its own, because Locust patches its process for gevent.

    .venv/bin/python -m loadtests.load.own_service --home SCRATCH --bases .bespoke/bases --base tiny \
        --adapters 4

It describes itself in SCRATCH/service.json, prints `ready`, and ends when its standard input does.
"""

import argparse
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from loadtests.load.service_under_test import ModelAccess, ServiceUnderTest
from loadtests.peers.process import free_port
from loadtests.synthetic import publish_random
from serve.billing.ledger.ledger import Ledger
from serve.billing.pricing.plans import Prices, read_plan
from serve.registry.registry import AdapterRegistry
from serve.settings import Settings, load_settings
from serve.storage.database import Store
from serve.tenants import Tenants, server_secret

CONFIGS = Path(__file__).parents[2] / "configs"
CUSTOMERS = ("load-1", "load-2", "load-3", "load-4")
LOUD = "load-loud"
LOUD_CONCURRENT_REQUESTS = 8
CREDIT_NANOS = 10**15
RANK = 8


def create_tenants(settings: Settings, base: str, adapters: int) -> ServiceUnderTest:
    """Creates tenants with credit, a price plan and keys, and `adapters` adapters with random weights."""
    now = datetime.now(UTC)
    store = Store(settings.store_url)
    store.migrate()
    tenants, prices, ledger = Tenants(store, server_secret(settings.home)), Prices(store), Ledger(store)
    prices.publish(plan := read_plan(CONFIGS / "prices" / "standard.yaml"), at=now)
    keys, billing_keys = {}, {}
    for tenant in (*CUSTOMERS, LOUD):
        tenants.create(tenant, at=now)
        ledger.open_account(tenant, CREDIT_NANOS)
        prices.subscribe(tenant, plan.name, at=now)
        _, keys[tenant] = tenants.create_key(tenant, at=now)
        _, billing_keys[tenant] = tenants.create_key(tenant, at=now, scopes=frozenset({"billing-read"}))
    tenants.change(LOUD, at=now, limits={"concurrent_requests": LOUD_CONCURRENT_REQUESTS})
    registry, base_dir = AdapterRegistry(store, settings.bases), settings.bases_dir / base
    models = []
    for number in range(adapters):
        tenant, name = CUSTOMERS[number % len(CUSTOMERS)], f"random-{number + 1}"
        directory = publish_random(
            base_dir, settings.adapters_dir, tenant=tenant, name=name, seed=number, rank=RANK
        )
        adapter = registry.register(
            directory, at=now, base_dir=base_dir, max_rank=settings.engine.max_lora_rank
        )
        registry.promote(adapter, at=now)
        models.append(ModelAccess(tenant, keys[tenant], f"{tenant}/{name}"))
    store.close()
    return ServiceUnderTest(
        url=f"http://{settings.host}:{settings.port}",
        models=(*models, ModelAccess(CUSTOMERS[0], keys[CUSTOMERS[0]], base)),
        billing_keys=billing_keys,
        loud_models=(ModelAccess(LOUD, keys[LOUD], base),),
        store_url=settings.store_url,
        pid=os.getpid(),
        description={"service": "its own", "base": base, "adapters": adapters},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--bases", type=Path, required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--adapters", type=int, required=True)
    options = parser.parse_args()
    from serve.deployment.local import LocalService

    (options.home / "bases").symlink_to(options.bases.resolve())
    profile = CONFIGS / "serve" / "cpu.yaml"
    settings = load_settings(
        profile, home=options.home.resolve(), host="127.0.0.1", port=free_port(), bases=[options.base]
    )
    service = create_tenants(settings, options.base, options.adapters)
    with LocalService(settings):
        service.write(options.home / "service.json")
        print("ready", flush=True)  # noqa: T201
        sys.stdin.read()


if __name__ == "__main__":
    main()
