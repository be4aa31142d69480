"""Caches which model a name means to a tenant, and at which prices.

A request is quoted from this cache without a read of the store. The transaction of its hold compares the
quote's revision with the store's (`HoldRequest.revision`) and raises StaleQuote if anything has changed. So
a promotion, a retirement or another plan counts from the next request on.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from serve.billing.pricing.plans import Prices, PriceVersion
from serve.errors import NotBillable
from serve.inference.quarantine import Quarantine
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import Model
from serve.storage import revision
from serve.storage.database import Store

ENTRIES_MAX = 10_000


@dataclass(frozen=True, slots=True)
class PricedModel:
    """A model and its price, valid at the store's `revision` and until `until`, when the next plan starts."""

    model: Model
    price: PriceVersion
    revision: int
    until: datetime | None


class ModelCache:
    """Holds the priced models of one gateway. `get` never blocks; `load` reads the store and blocks."""

    def __init__(self, store: Store, registry: AdapterRegistry, quarantine: Quarantine) -> None:
        self._store = store
        self._registry = registry
        self._quarantine = quarantine
        self._prices = Prices(store)
        self._priced_models: OrderedDict[tuple[str, str], PricedModel] = OrderedDict()

    def get(self, tenant: str, name: str, at: datetime) -> PricedModel | None:
        priced_model = self._priced_models.get((tenant, name))
        if priced_model is None or (priced_model.until is not None and at >= priced_model.until):
            return None
        return priced_model

    def load(self, tenant: str, name: str, at: datetime) -> PricedModel:
        """Raises ModelNotFound, NotBillable, StoreUnavailable."""
        with self._store.read() as connection:
            number = revision.current(connection)
            self._quarantine.load(connection, at)
            model = self._registry.resolve(connection, tenant, name)
            price = self._prices.at(connection, tenant, at)
            until = self._prices.next_change(connection, tenant, at)
        if price is None:
            raise NotBillable(tenant)
        priced_model = self._priced_models[tenant, name] = PricedModel(model, price, number, until)
        while len(self._priced_models) > ENTRIES_MAX:
            self._priced_models.popitem(last=False)
        return priced_model

    def clear(self) -> None:
        """Load everything anew, because the store has changed."""
        self._priced_models.clear()
