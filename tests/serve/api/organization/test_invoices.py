"""A customer reads its own issued invoices, and no other tenant's."""

from datetime import UTC, datetime

import pytest

from serve.billing.invoicing.invoices import Invoices
from tests.serve.api.organization.test_organization import Json, Office
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON
from tests.support.databases import on_sqlite

DECEMBER = datetime(2026, 12, 2, tzinfo=UTC)
PATH = "invoices"


@pytest.fixture
def office(shop: BillingFixture) -> Office:
    return Office(shop)


def read(office: Office, path: str, caller: str = "acme", **params: str) -> Json:
    key = office.platform if caller == "platform" else office.keys[caller]
    answer = office.ask(path, key, **params)
    assert answer.status_code == 200, answer.text
    body: Json = answer.json()
    return body


def issue(shop: BillingFixture, tenant: str) -> str:
    invoices = Invoices(shop.store)
    draft = invoices.create(tenant, "2026-11", at=DECEMBER)
    invoices.review(draft.number, at=DECEMBER)
    return invoices.finalize(draft.number, at=DECEMBER).number


def test_a_customer_reads_its_own_invoice_down_to_the_request(office: Office) -> None:
    office.use(NOON)
    office.use(NOON)
    number = issue(office.shop, "acme")
    (listed,) = read(office, PATH)["data"]
    shown = read(office, f"{PATH}/{number}")
    assert listed == shown
    assert (shown["id"], shown["state"], shown["total_nanos"]) == (number, "finalized", 2000)
    (day,) = read(office, f"{PATH}/{number}/usage")["data"]
    assert (day["id"], day["requests"], day["cost_nanos"]) == ("2026-11-22", 2, 2000)
    requests = read(office, f"{PATH}/{number}/requests", day="2026-11-22")["data"]
    assert [one["cost_nanos"] for one in requests] == [1000, 1000]
    assert read(office, f"{PATH}/{number}/credit-notes")["data"] == []


@on_sqlite
@pytest.mark.parametrize("format", ["csv", "json", "pdf"])
def test_it_gets_the_invoice_as_a_file(office: Office, format: str) -> None:
    office.use(NOON)
    number = issue(office.shop, "acme")
    answer = office.ask(f"{PATH}/{number}/file", format=format)
    assert answer.status_code == 200
    assert f'filename="{number}.{format}"' in answer.headers["content-disposition"]
    assert answer.content.startswith({"csv": b"\xef\xbb\xbfinvoice", "json": b"{", "pdf": b"%PDF"}[format])


@on_sqlite
def test_anothers_invoice_a_draft_and_none_look_the_same(office: Office) -> None:
    office.use(NOON)
    office.use(NOON, "rival")
    number = issue(office.shop, "acme")
    draft = Invoices(office.shop.store).create("rival", "2026-11", at=DECEMBER).number
    assert read(office, PATH, caller="rival")["data"] == []
    for name in (number, draft, "INV-2026-999999"):
        for rest in ("", "/file", "/usage", "/requests", "/credit-notes"):
            answer = office.ask(f"{PATH}/{name}{rest}", office.keys["rival"])
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"There is no invoice '{name}'."


@on_sqlite
def test_the_operator_reads_all_of_them_or_one_tenants(office: Office) -> None:
    office.use(NOON)
    office.use(NOON, "rival")
    numbers = {issue(office.shop, "acme"), issue(office.shop, "rival")}
    assert {one["id"] for one in read(office, PATH, caller="platform")["data"]} == numbers
    (mine,) = read(office, PATH, caller="platform", tenant="rival")["data"]
    assert mine["tenant"] == "rival"
