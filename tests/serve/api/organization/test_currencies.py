"""Money of two currencies is never one number: not in costs, nor in a forecast, nor in a balance."""

from collections import defaultdict
from datetime import timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.billing.pricing.plans import Prices
from tests.serve.api.organization.test_organization import DAY_S, MIDNIGHT, Office
from tests.serve.api.organization.test_organization import office as office
from tests.support.constants import NOON, PLAN
from tests.support.databases import on_sqlite

CURRENCIES = {"acme": "USD", "tokyo": "JPY", "kuwait": "KWD"}


@pytest.fixture
def abroad(office: Office) -> Office:
    """Two more tenants, who buy in yen and in dinars."""
    prices = Prices(office.shop.store)
    for tenant, currency in CURRENCIES.items():
        if tenant == "acme":
            continue
        office.shop.tenants.create(tenant, at=NOON)
        abroad_plan = PLAN.model_copy(update={"name": tenant, "currency": currency})
        office.price_ids[tenant] = prices.publish(abroad_plan, at=NOON).id
        office.shop.ledger.open_account(tenant, 10**12)
        prices.subscribe(tenant, tenant, at=NOON)
        office.key_ids[tenant] = office.shop.tenants.create_key(tenant, at=NOON)[0].id
        _, office.keys[tenant] = office.shop.tenants.create_key(
            tenant, at=NOON, scopes=frozenset({"billing-read"})
        )
    return office


def use(office: Office, tenant: str, nanos: int, days: int = 0) -> None:
    office.use(NOON - timedelta(days=days), tenant, cost_nanos=nanos)


@on_sqlite
def test_an_operators_costs_are_one_result_for_each_currency(abroad: Office) -> None:
    use(abroad, "acme", 1000)
    use(abroad, "tokyo", 70)
    use(abroad, "kuwait", 9)
    use(abroad, "tokyo", 7)
    start = int(MIDNIGHT.timestamp())
    page = abroad.costs(abroad.platform, start_time=start, end_time=start + DAY_S)
    (bucket,) = page["data"]
    told = {one["amount"]["currency"]: one["amount_nanos"] for one in bucket["results"]}
    assert told == {"usd": 1000, "jpy": 77, "kwd": 9}
    for tenant, currency in CURRENCIES.items():
        (own,) = abroad.costs(abroad.keys[tenant], start_time=start, end_time=start + DAY_S)["data"]
        assert [one["amount"]["currency"] for one in own["results"]] == [currency.lower()]


@on_sqlite
def test_a_balance_and_a_forecast_name_the_tenants_currency(abroad: Office) -> None:
    for tenant, currency in CURRENCIES.items():
        use(abroad, tenant, 100, days=1)
        balance = abroad.ask("balance", abroad.keys[tenant]).json()
        assert (balance["currency"], balance["spent_nanos"]) == (currency, 100)
        forecast = abroad.ask("forecast", abroad.keys[tenant]).json()
        assert [total["currency"] for total in forecast["totals"]] == [currency]
    everybody = abroad.ask("forecast", abroad.platform).json()
    assert {total["currency"]: total["to_date_nanos"] for total in everybody["totals"]} == dict.fromkeys(
        CURRENCIES.values(), 100
    )


@on_sqlite
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(sorted(CURRENCIES)), st.integers(1, 10**6)), max_size=6))
def test_no_group_of_costs_holds_money_of_two_currencies(abroad: Office, uses: list[tuple[str, int]]) -> None:
    start = int(MIDNIGHT.timestamp())
    window = {"start_time": start, "end_time": start + DAY_S}

    def totals(**groups: str) -> dict[str, int]:
        sums: dict[str, int] = defaultdict(int)
        for bucket in abroad.costs(abroad.platform, **window, **groups)["data"]:
            for one in bucket["results"]:
                sums[one["amount"]["currency"]] += one["amount_nanos"]
        return sums

    expected = totals()
    for tenant, nanos in uses:
        use(abroad, tenant, nanos)
        expected[CURRENCIES[tenant].lower()] += nanos
    for group in ("tenant", "api_key_id", "line_item", "project_id"):
        assert totals(group_by=group) == expected
    assert totals() == expected
