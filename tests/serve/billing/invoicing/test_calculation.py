import csv
import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from pypdf import PdfReader

from serve.billing.invoicing.billing_details import SELLER, BillingDetails
from serve.billing.invoicing.document import InvoiceDocument, Party
from serve.billing.invoicing.export import json_text, write_csv
from serve.billing.invoicing.invoices import Invoices, period_bounds
from serve.billing.invoicing.pdf import write_pdf
from serve.billing.ledger.holds import Hold
from serve.billing.money import exact, nanos_of
from serve.billing.pricing.plans import BatchRates, Prices, Rates, Tax, Tokens
from serve.errors import OperatorError, UnknownRecord
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN, RATES
from tests.support.usage_events import usage_event

MONTH = "2026-11"


def buy(
    shop: BillingFixture, number: int, *, adapter: bool, days: int = 0, tier: str = "default", times: int = 1
) -> int:
    """Settle one request and return its cost."""
    tokens = Tokens(times * (100 + number), times * 20, times * (30 + number))
    cost = shop.price.rates(adapter=adapter, batch=tier == "batch").cost_nanos(tokens)
    at = NOON + timedelta(days=days)
    hold = Hold(f"r{number}", "acme", cost)
    shop.ledger.hold(hold, at=at, lease=timedelta(hours=1))
    event = usage_event(
        hold.request_id,
        key_id=shop.principal.key_id,
        plan_id=shop.price.id,
        at=at,
        model="acme/support" if adapter else "tiny",
        adapter_version="acme/support@0123456789abcdef" if adapter else None,
        tokens=tokens,
        cost_nanos=cost,
        tier=tier,
    )
    assert shop.ledger.settle(hold, event, at=at)
    return cost


def text_of(path: Path) -> str:
    return "".join(page.extract_text() for page in PdfReader(path).pages)


def test_an_invoice_is_the_sum_of_the_months_events_to_the_nano(shop: BillingFixture) -> None:
    costs = [buy(shop, number, adapter=number % 2 == 0) for number in range(7)]
    buy(shop, 100, adapter=False, days=20)  # December
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    assert invoice.document.total_nanos == sum(costs)
    assert [line.model for line in invoice.document.lines] == ["acme/support", "tiny"]
    assert invoice.is_draft
    december = Invoices(shop.store).create("acme", "2026-12", at=NOON).document.total_nanos
    assert shop.ledger.account("acme").spent_nanos == sum(costs) + december


def test_running_a_month_again_gives_the_same_invoice_and_more_usage_a_new_revision(
    shop: BillingFixture,
) -> None:
    invoices = Invoices(shop.store)
    buy(shop, 1, adapter=True)
    first = invoices.create("acme", MONTH, at=NOON)
    assert invoices.create("acme", MONTH, at=NOON + timedelta(hours=1)) == first
    buy(shop, 2, adapter=True)
    second = invoices.create("acme", MONTH, at=NOON + timedelta(hours=2))
    assert (first.number, second.number) == ("acme-2026-11-r1", "acme-2026-11-r2")


def test_the_files_say_what_the_invoice_says(shop: BillingFixture, tmp_path: Path) -> None:
    for number in range(3):
        buy(shop, number, adapter=number > 0)
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    write_csv(invoice, tmp_path / "i.csv")
    rows = list(csv.DictReader((tmp_path / "i.csv").open(encoding="utf-8-sig")))
    subtotals = [nanos_of(row["amount"]) for row in rows if row["class"] == "subtotal"]
    (total,) = [nanos_of(row["amount"]) for row in rows if row["class"] == "total"]
    assert sum(subtotals) == total == invoice.document.total_nanos
    said = json.loads(json_text(invoice))
    assert InvoiceDocument.model_validate(said["document"]) == invoice.document
    assert said["total_nanos"] == total
    write_pdf(invoice, tmp_path / "i.pdf")
    text = text_of(tmp_path / "i.pdf")
    for expected in (
        "acme-2026-11-r1",
        "November 2026",
        "acme/support",
        exact(invoice.document.total_nanos, "USD"),
    ):
        assert expected in text


def test_seller_and_buyer_are_on_the_invoice_whatever_their_letters_are(
    shop: BillingFixture, tmp_path: Path
) -> None:
    parties = BillingDetails(shop.store)
    parties.put(SELLER, Party(name="Bespoke GmbH", address="Hauptstraße 1\n10115 Berlin", tax_id="DE123"))
    parties.put("acme", Party(name="Łódź 東京 株式会社", address="ul. Żółta 5", tax_id="PL9"))
    buy(shop, 1, adapter=True)
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    write_pdf(invoice, tmp_path / "i.pdf")
    for expected in ("Bespoke GmbH", "DE123", "PL9"):
        assert expected in text_of(tmp_path / "i.pdf")
    assert "Łódź 東京" in json_text(invoice)
    with pytest.raises(UnknownRecord):
        parties.put("nobody", Party(name="x"))


def test_without_their_details_the_pdf_says_what_is_missing(shop: BillingFixture, tmp_path: Path) -> None:
    write_pdf(Invoices(shop.store).create("acme", MONTH, at=NOON), tmp_path / "i.pdf")
    text = text_of(tmp_path / "i.pdf")
    assert "the seller's details are not set" in text
    assert "no billing details given" in text


def test_batches_are_lines_of_their_own_at_their_own_rates(shop: BillingFixture, tmp_path: Path) -> None:
    half = Rates(**{name: nanos // 2 for name, nanos in RATES.model_dump().items()})
    plan = PLAN.model_copy(update={"batch": BatchRates(base=half, adapter=half)})
    prices = Prices(shop.store)
    cheaper = replace(shop, price=prices.publish(plan, at=NOON))
    direct, batch = buy(cheaper, 0, adapter=True), buy(cheaper, 1, adapter=True, tier="batch")
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    lines = invoice.document.lines
    assert [(line.label, line.amount_nanos) for line in lines] == [
        ("acme/support", direct),
        ("acme/support (batch)", batch),
    ]
    assert [line.items[-1].nanos for line in lines] == [400_000_000, 200_000_000]
    write_csv(invoice, tmp_path / "i.csv")
    rows = list(csv.DictReader((tmp_path / "i.csv").open(encoding="utf-8-sig")))
    subtotals = {row["tier"]: row["amount"] for row in rows if row["class"] == "subtotal"}
    assert subtotals == {"default": exact(direct, "USD"), "batch": exact(batch, "USD")}
    write_pdf(invoice, tmp_path / "i.pdf")
    assert "(batch)" in text_of(tmp_path / "i.pdf")


def test_names_that_begin_like_formulas_are_text_in_the_csv(shop: BillingFixture, tmp_path: Path) -> None:
    plan = PLAN.model_copy(update={"tax": Tax(name="=VAT", percent="19"), "minimum_nanos": 10**9})
    buy(replace(shop, price=Prices(shop.store).publish(plan, at=NOON)), 0, adapter=True)
    Prices(shop.store).subscribe("acme", PLAN.name, at=NOON)
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    write_csv(invoice, tmp_path / "i.csv")
    assert (tmp_path / "i.csv").read_bytes().startswith(b"\xef\xbb\xbfinvoice,")
    rows = list(csv.DictReader((tmp_path / "i.csv").open(encoding="utf-8-sig")))
    assert [row["class"] for row in rows if row["kind"] == "tax"] == ["'=VAT 19%"]
    item, subtotal = (row for row in rows if row["kind"] == "minimum")
    assert item["price_per_unit"] == subtotal["amount"]


def test_a_month_without_usage_is_an_empty_invoice(shop: BillingFixture, tmp_path: Path) -> None:
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    assert (invoice.document.lines, invoice.document.total_nanos) == ((), 0)
    write_csv(invoice, tmp_path / "i.csv")
    write_pdf(invoice, tmp_path / "i.pdf")


@pytest.mark.parametrize("period", ["2026", "2026-13", "2026-1", "26-01", "2026-00", "9999-12", "x"])
def test_what_is_not_a_month_is_refused(period: str) -> None:
    with pytest.raises(OperatorError, match=period):
        period_bounds(period)


def test_an_unknown_tenant_has_no_invoice(shop: BillingFixture) -> None:
    with pytest.raises(UnknownRecord):
        Invoices(shop.store).create("nobody", MONTH, at=NOON)
