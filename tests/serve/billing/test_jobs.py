from datetime import UTC, datetime

from serve.billing.invoicing.invoices import Invoices
from serve.billing.jobs import draft_due
from tests.serve.billing.invoicing.test_calculation import buy
from tests.support.billing_fixture import BillingFixture

DECEMBER = datetime(2026, 12, 1, 0, 30, tzinfo=UTC)


def test_when_a_month_is_over_there_is_one_draft_for_each_tenant_that_used_anything(
    shop: BillingFixture,
) -> None:
    shop.tenants.create("idle", at=DECEMBER)
    cost = buy(shop, 1, adapter=False)
    (number,) = draft_due(shop.store, DECEMBER)
    draft = Invoices(shop.store).get(number)
    assert (draft.document.tenant, draft.document.period) == ("acme", "2026-11")
    assert draft.document.total_nanos == cost
    assert draft_due(shop.store, DECEMBER) == []


def test_a_month_that_is_not_over_has_none(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=False)
    assert draft_due(shop.store, datetime(2026, 11, 30, 23, 59, tzinfo=UTC)) == []
