import csv
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from pypdf import PdfReader

from serve.billing.invoice import Invoices, invoices_table, period_bounds
from serve.billing.invoice_files import write_csv, write_pdf
from serve.billing.ledger import Hold
from serve.billing.money import nanos_of_usd, usd
from serve.billing.pricing import BatchRates, Prices, Rates, Tokens
from serve.billing.usage import Status, UsageEvent
from serve.errors import OperatorError, UnknownRecord
from tests.serve.conftest import NOON, PLAN, Shop

MONTH = "2026-11"


def buy(shop: Shop, number: int, *, adapter: bool, days: int = 0, tier: str = "default") -> int:
    """One settled request; returns its cost."""
    tokens = Tokens(100 + number, 20, 30 + number)
    cost = shop.price.rates(adapter=adapter, batch=tier == "batch").cost_nanos(tokens)
    at = NOON + timedelta(days=days)
    hold = Hold(f"r{number}", "acme", cost)
    with shop.store.write() as connection:
        shop.ledger.hold(connection, hold, at=at, lease=timedelta(hours=1))
    event = UsageEvent(
        request_id=hold.request_id,
        tenant="acme",
        key_id=shop.principal.key_id,
        model="acme/support" if adapter else "tiny",
        base="tiny",
        adapter_version="acme/support@0123456789abcdef" if adapter else None,
        plan_id=shop.price.id,
        replica="r",
        boot="b",
        samples=1,
        tokens=tokens,
        cost_nanos=cost,
        status=Status.COMPLETE,
        finish_reason="stop",
        ttft_ms=1,
        latency_ms=2,
        created_at=at,
        tier=tier,
    )
    assert shop.ledger.settle(hold, event, at=at)
    return cost


def test_an_invoice_is_the_sum_of_the_months_events_to_the_nano(shop: Shop) -> None:
    costs = [buy(shop, number, adapter=number % 2 == 0) for number in range(7)]
    buy(shop, 100, adapter=False, days=20)  # December
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    assert invoice.document.total_nanos == sum(costs)
    assert [line.model for line in invoice.document.lines] == ["acme/support", "tiny"]
    assert invoice.is_draft
    december = Invoices(shop.store).create("acme", "2026-12", at=NOON).document.total_nanos
    assert shop.ledger.account("acme").spent_nanos == sum(costs) + december


def test_running_a_month_again_gives_the_same_invoice_and_more_usage_a_new_revision(shop: Shop) -> None:
    invoices = Invoices(shop.store)
    buy(shop, 1, adapter=True)
    first = invoices.create("acme", MONTH, at=NOON)
    assert invoices.create("acme", MONTH, at=NOON + timedelta(hours=1)) == first
    buy(shop, 2, adapter=True)
    second = invoices.create("acme", MONTH, at=NOON + timedelta(hours=2))
    assert (first.number, second.number) == ("acme-2026-11-r1", "acme-2026-11-r2")


def test_the_files_say_what_the_invoice_says(shop: Shop, tmp_path: Path) -> None:
    for number in range(3):
        buy(shop, number, adapter=number > 0)
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    write_csv(invoice, tmp_path / "i.csv")
    rows = list(csv.DictReader((tmp_path / "i.csv").open()))
    subtotals = [nanos_of_usd(row["amount_usd"]) for row in rows if row["class"] == "subtotal"]
    (total,) = [nanos_of_usd(row["amount_usd"]) for row in rows if row["class"] == "total"]
    assert sum(subtotals) == total == invoice.document.total_nanos
    write_pdf(invoice, tmp_path / "i.pdf")
    text = "".join(page.extract_text() for page in PdfReader(tmp_path / "i.pdf").pages)
    for expected in ("acme-2026-11-r1", "November 2026", "acme/support", usd(invoice.document.total_nanos)):
        assert expected in text


def test_batches_are_lines_of_their_own_at_their_own_rates(shop: Shop, tmp_path: Path) -> None:
    half = Rates(**{name: nanos // 2 for name, nanos in PLAN.adapter.model_dump().items()})
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
    assert [line.completion_nanos_per_mtok for line in lines] == [400_000_000, 200_000_000]
    write_csv(invoice, tmp_path / "i.csv")
    rows = list(csv.DictReader((tmp_path / "i.csv").open()))
    subtotals = {row["tier"]: row["amount_usd"] for row in rows if row["class"] == "subtotal"}
    assert subtotals == {"default": usd(direct), "batch": usd(batch)}
    write_pdf(invoice, tmp_path / "i.pdf")
    assert "(batch)" in "".join(page.extract_text() for page in PdfReader(tmp_path / "i.pdf").pages)


def test_an_invoice_from_before_there_were_tiers_is_still_the_same(shop: Shop) -> None:
    buy(shop, 1, adapter=True)
    first = Invoices(shop.store).create("acme", MONTH, at=NOON)
    with shop.store.write() as connection:
        old = first.document.model_dump_json().replace(',"tier":"default"', "")
        connection.execute(invoices_table.update().values(document=old))
    assert Invoices(shop.store).create("acme", MONTH, at=NOON + timedelta(hours=1)) == first


def test_a_month_without_usage_is_an_empty_invoice(shop: Shop, tmp_path: Path) -> None:
    invoice = Invoices(shop.store).create("acme", MONTH, at=NOON)
    assert (invoice.document.lines, invoice.document.total_nanos) == ((), 0)
    write_csv(invoice, tmp_path / "i.csv")
    write_pdf(invoice, tmp_path / "i.pdf")


@pytest.mark.parametrize("period", ["2026", "2026-13", "2026-1", "26-01", "2026-00", "9999-12", "x"])
def test_what_is_not_a_month_is_refused(period: str) -> None:
    with pytest.raises(OperatorError, match=period):
        period_bounds(period)


def test_an_unknown_tenant_has_no_invoice(shop: Shop) -> None:
    with pytest.raises(UnknownRecord):
        Invoices(shop.store).create("nobody", MONTH, at=NOON)
