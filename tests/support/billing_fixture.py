"""Tenants that may buy, in a new store."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from serve.billing.ledger.ledger import Ledger
from serve.billing.pricing.plans import Prices, PriceVersion
from serve.storage.database import Store
from serve.tenants import Principal, Tenants, server_secret
from tests.support.constants import NOON, PLAN


@dataclass(frozen=True)
class BillingFixture:
    """A store with one tenant that may buy."""

    store: Store
    tenants: Tenants
    ledger: Ledger
    principal: Principal
    secret: str
    price: PriceVersion


def onboard(store: Store, home: Path, names: Iterable[str]) -> dict[str, str]:
    """Migrates the store and creates tenants that may buy. Returns a key of each."""
    store.migrate()
    tenants, prices, keys = Tenants(store, server_secret(home)), Prices(store), {}
    prices.publish(PLAN, at=NOON)
    for tenant in names:
        tenants.create(tenant, at=NOON)
        Ledger(store).open_account(tenant, 10**12)
        prices.subscribe(tenant, PLAN.name, at=NOON)
        _, keys[tenant] = tenants.create_key(tenant, at=NOON, scopes=frozenset({"inference", "files"}))
    return keys
