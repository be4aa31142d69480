"""Invoices and credit over HTTP, for the operator; a tenant's own admin sees none of it there."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.billing.pricing.plans import PricePlan, Prices
from tests.serve.api.admin.test_admin import AdminClient
from tests.serve.billing.invoicing.test_calculation import MONTH, buy
from tests.serve.billing.invoicing.test_invoices import DECEMBER, finalize
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN
from tests.support.databases import on_sqlite

BUYER = {"name": "Acme Käse 有限公司", "address": "Hauptstraße 1\n10115 Berlin", "tax_id": "DE1"}


CENT = 10_000_000  # nanos


@pytest.fixture
def admin_client(shop: BillingFixture, tmp_path: Path) -> AdminClient:
    return AdminClient(shop, tmp_path)


@on_sqlite
def test_a_month_becomes_an_invoice_that_is_not_final_before_its_end(admin_client: AdminClient) -> None:
    buy(admin_client.shop, 1, adapter=True)
    created = admin_client.say("POST", "/invoices", {"tenant": "acme", "period": MONTH}, 201)
    assert (created["id"], created["state"], created["total_nanos"]) == (
        "acme-2026-11-r1",
        "draft",
        created["document"]["lines"][0]["amount_nanos"],
    )
    assert admin_client.say("POST", "/invoices", {"tenant": "acme", "period": MONTH}, 201) == created
    path = f"/invoices/{created['id']}/transition"
    reviewed = admin_client.say("POST", path, {"state": "review", "reason": "please look"})
    assert [change["reason"] for change in reviewed["history"]] == ["created", "please look"]
    assert reviewed["history"][1]["actor"] == f"platform:{admin_client.platform_id}"
    admin_client.say("POST", path, {"state": "paid"}, 409)
    if datetime.now(UTC) < datetime(2026, 12, 1, tzinfo=UTC):
        assert "not over" in admin_client.say("POST", path, {"state": "finalized"}, 409)["error"]["message"]
    assert admin_client.say("POST", path, {"state": "draft"})["state"] == "draft"


@on_sqlite
def test_a_final_invoice_is_listed_read_paid_and_credited(admin_client: AdminClient) -> None:
    cost = buy(admin_client.shop, 1, adapter=False, times=5000)
    number = finalize(admin_client.shop).number
    listed = admin_client.say("GET", "/invoices?state=finalized&tenant=acme&period=" + MONTH)
    assert [(one["id"], one["total_nanos"]) for one in listed["data"]] == [(number, cost)]
    assert admin_client.say("GET", "/invoices?period=2026-11&tenant=rival")["data"] == []
    note = admin_client.say(
        "POST",
        f"/invoices/{number}/credit-notes",
        {"reason": "slow", "lines": [{"line": 1, "amount_nanos": 2 * CENT}, {"amount_nanos": CENT}]},
        201,
    )
    assert (note["id"][:3], note["amount_nanos"]) == ("CN-", 3 * CENT)
    assert admin_client.say("GET", f"/invoices/{number}/credit-notes")["data"] == [note]
    paid = admin_client.say("POST", f"/invoices/{number}/transition", {"state": "paid"})
    assert (paid["state"], paid["history"][-1]["state"]) == ("paid", "paid")
    assert admin_client.say("GET", f"/invoices/{number}")["document"] == paid["document"]


def test_a_line_is_followed_down_to_its_requests(admin_client: AdminClient) -> None:
    for number in range(3):
        buy(admin_client.shop, number, adapter=False, days=number // 2)
    number = finalize(admin_client.shop).number
    days = admin_client.say("GET", f"/invoices/{number}/usage?by=day&line=1")["data"]
    assert [(day["id"], day["requests"]) for day in days] == [("2026-11-22", 2), ("2026-11-23", 1)]
    keys = admin_client.say("GET", f"/invoices/{number}/usage?by=key&day=2026-11-22")["data"]
    assert [key["requests"] for key in keys] == [2]
    first = admin_client.say("GET", f"/invoices/{number}/requests?line=1&limit=2")
    assert ([one["id"] for one in first["data"]], first["has_more"]) == (["r0", "r1"], True)
    rest = admin_client.say("GET", f"/invoices/{number}/requests?after=r1&key={keys[0]['id']}")
    assert [one["price"] for one in rest["data"]] == ["standard v1"]
    for query in ("line=9", "day=2026-02-30", "after=nothing"):
        admin_client.say(
            "GET", f"/invoices/{number}/requests?{query}", status=409 if "line" in query else 400
        )


@on_sqlite
@pytest.mark.parametrize("form", ["csv", "json", "pdf"])
def test_an_invoice_is_a_file_with_whatever_names(admin_client: AdminClient, form: str) -> None:
    assert admin_client.say("PUT", "/tenants/acme/billing-details", BUYER)["details"]["name"] == BUYER["name"]
    admin_client.say("PUT", "/seller", {"name": "Bespoke Ltd"})
    assert admin_client.say("GET", "/seller")["details"]["name"] == "Bespoke Ltd"
    buy(admin_client.shop, 1, adapter=False)
    number = finalize(admin_client.shop).number
    answer = admin_client.ask("GET", f"/admin/v1/invoices/{number}/file?format={form}")
    assert answer.status_code == 200
    assert form in answer.headers["content-type"]
    assert f"{number}.{form}" in answer.headers["content-disposition"]
    assert answer.content


def test_credit_is_granted_and_listed_with_what_is_left(admin_client: AdminClient) -> None:
    created = admin_client.say(
        "POST", "/tenants/acme/grants", {"amount_nanos": 10**6, "expires_at": 2 * 10**9}, 201
    )
    assert (created["kind"], created["expires_at"] % 86_400) == ("prepaid", 0)
    assert [one["left_nanos"] for one in admin_client.say("GET", "/tenants/acme/grants")["data"]] == [10**6]
    admin_client.say("POST", "/tenants/acme/grants", {"amount_nanos": 1, "expires_at": 5}, 409)
    admin_client.say("POST", "/tenants/nobody/grants", {"amount_nanos": 1}, 404)


@on_sqlite
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/invoices", {"tenant": "acme", "period": "2026-13"}),
        ("/invoices", {"tenant": "acme", "period": MONTH, "early": True}),
        ("/invoices/x/transition", {"state": "final"}),
        ("/invoices/x/transition", {"state": "void", "reason": "x" * 201}),
        ("/invoices/x/credit-notes", {"reason": "", "lines": [{"amount_nanos": 1}]}),
        ("/invoices/x/credit-notes", {"reason": "r", "lines": []}),
        ("/invoices/x/credit-notes", {"reason": "r", "lines": [{"amount_nanos": 0}]}),
        ("/tenants/acme/grants", {"amount_nanos": 10**19}),
        ("/tenants/acme/grants", {"amount_nanos": 1, "expires_at": 10**13}),
    ],
)
def test_what_is_out_of_bounds_is_refused(
    admin_client: AdminClient, path: str, body: dict[str, object]
) -> None:
    admin_client.say("POST", path, body, 400)


@on_sqlite
def test_what_is_not_there_is_not_found(admin_client: AdminClient) -> None:
    for path in ("/invoices/INV-2026-000009", "/invoices/acme-2026-11-r9999999999", "/invoices/x/usage"):
        admin_client.say("GET", path, status=404)
    admin_client.say("POST", "/invoices", {"tenant": "nobody", "period": MONTH}, 404)


@on_sqlite
def test_a_plan_is_assigned_from_a_day_on_but_not_before_it_may_be_paid(admin_client: AdminClient) -> None:
    later = PLAN.model_dump() | {"name": "later", "effective_from": "2099-12-01"}
    Prices(admin_client.shop.store).publish(PricePlan.model_validate(later), at=NOON)
    path, day = "/tenants/acme/subscription", int(datetime(2099, 12, 1, tzinfo=UTC).timestamp())
    assert "2099-12-01" in admin_client.say("PUT", path, {"plan": "later"}, 409)["error"]["message"]
    admin_client.say("PUT", path, {"plan": "later", "effective_at": int(NOON.timestamp()) - 10**7}, 400)
    assert admin_client.say("PUT", path, {"plan": "later", "effective_at": day})["effective_at"] == day


@on_sqlite
def test_a_plan_is_ended_by_assigning_none_and_what_was_used_is_still_billed(
    admin_client: AdminClient,
) -> None:
    path, prices = "/tenants/acme/subscription", Prices(admin_client.shop.store)
    admin_client.say("PUT", path, {}, 400)
    ended = admin_client.say("PUT", path, {"plan": None})
    assert ended["price"] is None
    at = datetime.fromtimestamp(ended["effective_at"] + 1, UTC)
    with admin_client.shop.store.read() as connection:
        assert prices.at(connection, "acme", at) is None
    assert admin_client.say("PUT", path, {"plan": None}, 404)["error"]["code"] == "not_found"
    buy(admin_client.shop, 1, adapter=False)
    document = admin_client.say("POST", "/invoices", {"tenant": "acme", "period": MONTH}, 201)["document"]
    assert (document["plan"], len(document["lines"])) == ("standard v1", 1)


@on_sqlite
def test_a_tenants_own_admin_sees_no_invoice_here(admin_client: AdminClient) -> None:
    buy(admin_client.shop, 1, adapter=False)
    number = finalize(admin_client.shop, at=DECEMBER).number
    for path in ("/invoices", f"/invoices/{number}", "/tenants/acme/grants", "/seller"):
        assert admin_client.ask("GET", f"/admin/v1{path}", admin_client.admins["acme"]).status_code == 404
