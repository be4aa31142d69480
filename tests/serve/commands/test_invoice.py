"""`bespoke price`, `invoice` and `credit`, as they are typed."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve.billing.pricing.plans import read_plan
from serve.cli import app
from serve.commands import credit_note, invoice
from tests.serve.billing.invoicing.test_calculation import MONTH, buy
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import CONFIGS
from tests.support.databases import on_sqlite

NEXT_MONTH = datetime(2026, 12, 2, tzinfo=UTC)


@pytest.fixture
def bespoke(shop: BillingFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Types a command, at a time when November is over; returns its output."""
    monkeypatch.setenv("BESPOKE_DATABASE_URL", shop.store.url)
    monkeypatch.setenv("BESPOKE_HOME", str(tmp_path / "home"))
    for module in (invoice, credit_note):
        monkeypatch.setattr(module, "now", lambda: NEXT_MONTH)
    runner = CliRunner()

    def run(*words: str) -> str:
        result = runner.invoke(app, list(words))
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    return run


@on_sqlite
def test_an_invoice_goes_from_draft_to_paid(shop: BillingFixture, bespoke, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for number in range(3):
        buy(shop, number, adapter=number == 2, times=1000)
    bespoke("invoice", "seller", str(CONFIGS / "seller.yaml"))
    buyer = tmp_path / "acme.yaml"
    buyer.write_text("name: Łódź Käse\naddress: Hauptstraße 1\n", encoding="utf-8")
    bespoke("invoice", "profile", "acme", str(buyer))
    assert "acme-2026-11-r1" in bespoke("invoice", "create", "acme", "--month", MONTH)
    bespoke("invoice", "review", "acme-2026-11-r1")
    assert "INV-2026-000001" in bespoke("invoice", "finalize", "acme-2026-11-r1", "--reason", "checked")
    folder = tmp_path / "home" / "invoices" / "acme"
    exported = json.loads((folder / "INV-2026-000001.json").read_text())
    assert exported["document"]["buyer"]["name"] == "Łódź Käse"
    assert "to the nano" in bespoke("invoice", "verify", "INV-2026-000001")
    for by, expected in (("day", "2026-11-22"), ("key", shop.principal.key_id), ("request", "r2")):
        assert expected in bespoke("invoice", "lines", "INV-2026-000001", "--by", by)
    assert "--after r0" in bespoke("invoice", "lines", "INV-2026-000001", "--by", "request", "--limit", "1")
    note = bespoke("invoice", "credit-note", "INV-2026-000001", "0.01", "--reason", "slow")
    assert "CN-2026-000001" in note
    assert (folder / "CN-2026-000001.pdf").stat().st_size > 1000
    assert "paid" in bespoke("invoice", "pay", "INV-2026-000001")
    shown = bespoke("invoice", "show", "INV-2026-000001")
    assert "checked" in shown
    assert "slow" in shown
    assert "INV-2026-000001" in bespoke("invoice", "list", "acme", "--state", "paid")
    bespoke("invoice", "export", "INV-2026-000001", "--format", "csv")


@on_sqlite
def test_credit_is_granted_and_listed(shop: BillingFixture, bespoke) -> None:  # type: ignore[no-untyped-def]
    words = ("--kind", "prepaid", "--expires", "2099-01-01", "--reason", "wire 7")
    bespoke("credit", "grant", "acme", "50", *words)
    assert "wire 7" in bespoke("credit", "list", "acme")
    assert bespoke("credit", "expire") == ""
    assert shop.ledger.account("acme").credit_nanos == 51 * 10**9


@on_sqlite
def test_a_plan_with_every_field_is_assigned_from_its_day_on(shop: BillingFixture, bespoke) -> None:  # type: ignore[no-untyped-def]
    path = CONFIGS / "prices" / "enterprise.yaml"
    bespoke("price", "publish", str(path))
    assert "2099-12-01" in bespoke("price", "assign", "acme", "enterprise", "--from", "2099-12-01")
    assert "graduated" in bespoke("price", "list")
    ended = bespoke("price", "end", "acme", "--from", "2099-12-15")
    assert "enterprise v1 no more from 2099-12-15" in ended
    plan = read_plan(path)
    assert (plan.proration, plan.tiers_over) == ("day", "all")
    assert plan.rates(model="smollm2-135m", adapter=False).prompt_nanos_per_mtok == 20_000_000
    assert plan.rates(model="tiny", adapter=False).completion_nanos_per_mtok == 200_000_000
