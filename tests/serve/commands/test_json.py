"""`--json`: the admin API's answer for the same store, on stdout and alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve.billing.credits.grants import Credits
from serve.cli import app
from serve.commands.common import console
from serve.errors import UnknownRecord
from tests.serve.api.admin.test_admin import AdminClient
from tests.serve.billing.invoicing.test_calculation import buy
from tests.serve.billing.invoicing.test_invoices import finalize
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, TINY
from tests.support.databases import on_sqlite

pytestmark = on_sqlite


@pytest.fixture
def admin_client(shop: BillingFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdminClient:
    monkeypatch.setenv("BESPOKE_DATABASE_URL", shop.store.url)
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path))
    monkeypatch.setenv("BESPOKE_BASES", json.dumps([TINY]))
    monkeypatch.setattr(console, "_width", 80)
    return AdminClient(shop, tmp_path)


def bespoke(*arguments: str) -> Any:
    """The JSON that a command prints, and nothing but JSON."""
    result = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_lists_are_those_of_the_admin_api(admin_client: AdminClient) -> None:
    Credits(admin_client.shop.store).grant("acme", 10**9, kind="prepaid", at=NOON, reason="wire [7]")
    for arguments, path in {
        ("project", "list", "acme"): "/tenants/acme/projects",
        ("key", "list", "acme"): "/tenants/acme/keys",
        ("platform", "key", "list"): "/platform-keys",
        ("budget", "list", "acme"): "/tenants/acme/budgets",
        ("credit", "list", "acme"): "/tenants/acme/grants",
        ("price", "list"): "/prices",
        ("adapter", "list", "acme"): "/tenants/acme/adapters",
        ("invoice", "list", "acme"): "/invoices?tenant=acme",
        ("audit", "--tenant", "acme", "--limit", "2"): "/audit?tenant=acme&limit=2",
    }.items():
        expected = admin_client.say("GET", path)
        assert expected["data"]
        assert bespoke(*arguments) == expected


def test_objects_are_those_of_the_admin_api(admin_client: AdminClient) -> None:
    names = admin_client.names["acme"]
    budget = f"/tenants/acme/budgets/{names['budget']}"
    assert bespoke("budget", "show", "acme", names["budget"]) == admin_client.say("GET", budget)
    (version, _) = admin_client.say("GET", "/tenants/acme/adapters")["data"]
    assert version["alias"] == "next"
    assert bespoke("adapter", "show", version["id"]) == version
    assert bespoke("adapter", "show", "acme/support") == version
    limits = ("--requests-per-min", "7")
    assert bespoke("tenant", "limits", "acme", *limits) == admin_client.say("GET", "/tenants/acme")
    assert bespoke("key", "limits", names["key"], *limits)["limits"]["requests_per_min"] == 7


def test_tenants_have_their_accounts_with_them(admin_client: AdminClient) -> None:
    tenants = bespoke("tenant", "list")
    accounts = {tenant["id"]: tenant.pop("account") for tenant in tenants["data"]}
    assert tenants == admin_client.say("GET", "/tenants")
    account = admin_client.shop.ledger.account("acme")
    assert accounts["acme"]["available_nanos"] == account.available_nanos
    assert accounts["rival"] is None


def test_an_invoice_has_its_credit_notes_and_lines_with_it(admin_client: AdminClient) -> None:
    for number in range(3):
        buy(admin_client.shop, number, adapter=False, times=1000)
    number = finalize(admin_client.shop).number
    lines = [{"line": 1, "amount_nanos": 10_000_000}]
    admin_client.say("POST", f"/invoices/{number}/credit-notes", {"reason": "slow", "lines": lines}, 201)
    invoice = bespoke("invoice", "show", number)
    notes = invoice.pop("credit_notes")
    assert notes == admin_client.say("GET", f"/invoices/{number}/credit-notes")["data"]
    assert invoice == admin_client.say("GET", f"/invoices/{number}")
    usage, requests = f"/invoices/{number}/usage", f"/invoices/{number}/requests?limit=2"
    assert bespoke("invoice", "lines", number) == admin_client.say("GET", usage)
    by_request = bespoke("invoice", "lines", number, "--by", "request", "--limit", "2")
    assert by_request == admin_client.say("GET", requests)
    assert by_request["has_more"]


def test_usage_and_its_forecast_have_the_shapes_of_the_organization_api(admin_client: AdminClient) -> None:
    cost = buy(admin_client.shop, 1, adapter=True) + buy(admin_client.shop, 2, adapter=True, days=1)
    page = bespoke("usage", "show", "acme", "--month", "2026-11")
    (bucket,) = page["data"]
    assert (page["object"], bucket["object"]) == ("page", "bucket")
    (result,) = bucket["results"]
    assert (result["tenant"], result["model"], result["num_model_requests"]) == ("acme", "acme/support", 2)
    assert result["cost_nanos"] == cost
    days = bespoke("usage", "show", "--by", "day")["data"]
    assert [day["end_time"] - day["start_time"] for day in days] == [86_400, 86_400]
    assert [len(day["results"]) for day in days] == [1, 1]
    assert bespoke("usage", "forecast", "acme")["object"] == "organization.forecast"


@pytest.mark.parametrize("noun", ["project", "key", "budget", "credit", "adapter"])
def test_a_tenant_that_does_not_exist_has_no_empty_list(admin_client: AdminClient, noun: str) -> None:
    result = CliRunner().invoke(app, [noun, "list", "nobody", "--json"])
    assert isinstance(result.exception, UnknownRecord)
    assert result.stdout == ""
