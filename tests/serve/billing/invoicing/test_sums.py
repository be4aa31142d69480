"""Tests how a month is counted: tiers over names, versions and late usage; days in force."""

from datetime import timedelta
from pathlib import Path

from serve.billing.invoicing.document import TierCount
from serve.billing.invoicing.export import invoice_csv
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.pdf import write_pdf
from tests.serve.billing.invoicing.test_calculation import buy, text_of
from tests.serve.billing.invoicing.test_invoices import JANUARY, TIERS, finalize, on_plan, tiered
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import PLAN


def test_late_usage_goes_on_where_its_month_ended_and_the_invoice_says_so(
    shop: BillingFixture, tmp_path: Path
) -> None:
    rates = PLAN.base.model_dump() | {"completion_nanos_per_mtok": TIERS}
    shop = on_plan(shop, base=rates, adapter=rates, tiers_over="all")
    buy(shop, 30, adapter=False)  # 60 completion tokens, of the first 100 of the month
    buy(shop, 0, adapter=False)  # 30
    november = finalize(shop)
    buy(shop, 1, adapter=True)  # 31 and 32, in November, after its end
    buy(shop, 2, adapter=False)
    buy(shop, 3, adapter=False, days=20)
    december = finalize(shop, "2026-12", JANUARY)
    own, adapter, base = december.document.lines
    items = [[(i.what, i.quantity) for i in line.items[2:]] for line in (own, adapter, base)]
    first, above = "completion tokens, first 100", "completion tokens, above 100"
    assert items == [[(first, 33)], [(first, 10), (above, 21)], [(above, 32)]]
    notes = [line.items[-1].note for line in (own, adapter, base)]
    assert notes == ["", "after 90 of 153 counted together", "after 121 of 153 counted together"]
    sentence = "all models are counted together"
    assert [sentence in november.document.counting[0], base.tiers_over] == [True, "all"]
    assert sentence in invoice_csv(december)
    assert "all,121,153" in invoice_csv(december)
    write_pdf(december, tmp_path / "i.pdf")
    assert sentence in text_of(tmp_path / "i.pdf").replace("\n", " ")
    # Later invoices of the same month of use change nothing of this one.
    buy(shop, 4, adapter=False)
    (january,) = finalize(shop, "2027-01", JANUARY + timedelta(days=31)).document.lines
    assert january.items[-1].counted == TierCount(before=153, tokens=34, total=187)
    for final in (november, december):
        assert Invoices(shop.store).recalculate(final.number) == final.document


def test_a_first_month_pays_the_minimum_of_its_days(shop: BillingFixture) -> None:
    changes = {"proration": "day", "minimum_nanos": 30_000_000, "included": {"completion_tokens": 300}}
    buy(on_plan(shop, **changes), 20, adapter=False)  # subscribed on 22 November: 9 days are left
    document = finalize(shop).document
    usage, minimum = document.lines
    assert (usage.items[-1].included, document.subtotal_nanos) == (50, 9_000_000)
    assert minimum.items[0].what == "rest of the minimum of 0.009 USD, prorated by day"
    assert document.counting == (
        "Minimum and included tokens are prorated by day (UTC): standard v2 (in force on 9 of 30 days): "
        "a minimum of 0.009 USD, 90 completion tokens included.",
    )
    buy(shop, 1, adapter=False, days=20)
    assert finalize(shop, "2026-12", JANUARY).document.subtotal_nanos == 30_000_000


def test_without_proration_a_first_month_pays_the_whole_minimum_and_says_so(shop: BillingFixture) -> None:
    buy(on_plan(shop, minimum_nanos=30_000_000), 20, adapter=False)
    document = finalize(shop).document
    assert document.subtotal_nanos == 30_000_000
    assert document.counting == (
        "Minimum and included tokens are not prorated: standard v2 (in force on 9 of 30 days): "
        "a minimum of 0.03 USD.",
    )


def test_a_price_that_changes_within_the_month_does_not_begin_the_tiers_anew(shop: BillingFixture) -> None:
    before = tiered(shop)
    buy(before, 30, adapter=False)  # 60
    after = tiered(shop, tax={"name": "VAT", "percent": "19"})
    buy(after, 31, adapter=False, days=1)  # 61
    lines = finalize(shop).document.lines
    assert [[i.quantity for i in line.items[2:]] for line in lines] == [[60], [40, 21]]
    assert {line.tiers_over for line in lines} == {"model"}
