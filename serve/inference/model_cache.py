"""What a name means to a tenant, and at which prices: remembered for as long as nothing has changed.

A request is quoted from memory, and its hold's own transaction sees whether the quote still stands
(`Opening.revision`): so a promotion, a retirement or another plan counts from the very next request on,
and no request asks the store for what it knows already.
"""

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime

from serve.billing.pricing.plans import Prices, PriceVersion
from serve.errors import NotBillable
from serve.registry.registry import AdapterRegistry
from serve.registry.versions import Model
from serve.storage import revision
from serve.storage.database import Store

REMEMBERED_MAX = 10_000


@dataclass(frozen=True, slots=True)
class PricedModel:
    """It stands at its `revision`, and until the plan that follows comes into force."""

    model: Model
    price: PriceVersion
    revision: int
    until: datetime | None


class ModelCache:
    """Of one gateway. `known` is for its event loop, `look_up` blocks."""

    def __init__(self, store: Store, registry: AdapterRegistry) -> None:
        self._store = store
        self._registry = registry
        self._prices = Prices(store)
        self._known: OrderedDict[tuple[str, str], PricedModel] = OrderedDict()

    def known(self, tenant: str, name: str, at: datetime) -> PricedModel | None:
        priced_model = self._known.get((tenant, name))
        return (
            None
            if priced_model is None or (priced_model.until is not None and at >= priced_model.until)
            else priced_model
        )

    def look_up(self, tenant: str, name: str, at: datetime) -> PricedModel:
        """Raises ModelNotFound, NotBillable, StoreUnavailable."""
        with self._store.read() as connection:
            number = revision.current(connection)
            model = self._registry.resolve(connection, tenant, name)
            price = self._prices.at(connection, tenant, at)
            until = self._prices.next_change(connection, tenant, at)
        if price is None:
            raise NotBillable(tenant)
        priced_model = self._known[tenant, name] = PricedModel(model, price, number, until)
        while len(self._known) > REMEMBERED_MAX:
            self._known.popitem(last=False)
        return priced_model

    def forget(self) -> None:
        """Something has changed: everything is looked up again."""
        self._known.clear()
