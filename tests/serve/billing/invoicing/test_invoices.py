"""Tests invoices from draft to paid: final ones never change, and the account agrees with them."""

import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from serve.billing.credits.charges import Charge, post_charge
from serve.billing.credits.grants import Credits
from serve.billing.invoicing.breakdown import InvoiceFilter, InvoiceUsage
from serve.billing.invoicing.credit_notes import CreditNotes, notes_table
from serve.billing.invoicing.document import sha256_of
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.store import Invoice, InvoiceState, finals_table, invoices_table, states_table
from serve.billing.ledger.accounts import transfers_table
from serve.billing.pricing.plans import PricePlan, Prices
from serve.errors import Conflict, InvalidRequest, UnknownRecord
from serve.tenants.audit import Audit
from tests.serve.billing.invoicing.test_calculation import MONTH, buy
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN

DECEMBER = datetime(2026, 12, 2, tzinfo=UTC)
JANUARY = datetime(2027, 1, 2, tzinfo=UTC)
TIERS = {
    "graduated": [
        {"up_to_tokens": 100, "nanos_per_mtok": 400_000_000},
        {"nanos_per_mtok": 100_000_000},
    ]
}


def on_plan(shop: BillingFixture, **changes: object) -> BillingFixture:
    """Subscribe the shop's tenant to another version of its plan, from the beginning."""
    plan = PricePlan.model_validate(PLAN.model_dump() | changes)
    prices = Prices(shop.store)
    price = prices.publish(plan, at=NOON)
    prices.subscribe("acme", plan.name, at=NOON)
    return replace(shop, price=price)


def tiered(shop: BillingFixture, **changes: object) -> BillingFixture:
    rates = PLAN.base.model_dump() | {"completion_nanos_per_mtok": TIERS}
    return on_plan(shop, base=rates, **changes)


def finalize(shop: BillingFixture, period: str = MONTH, at: datetime = DECEMBER) -> Invoice:
    invoices = Invoices(shop.store)
    draft = invoices.create("acme", period, at=at)
    if draft.state == InvoiceState.DRAFT:
        invoices.review(draft.number, at=at, actor="ada")
    return invoices.finalize(draft.number, at=at, actor="ada", reason="checked")


def test_a_final_invoice_has_a_number_a_fingerprint_and_a_history(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=True)
    final = finalize(shop)
    assert (final.number, final.state, final.is_draft) == ("INV-2026-000001", InvoiceState.FINALIZED, False)
    assert final.issued_at is not None
    assert final.sha256 == sha256_of(final.number, final.issued_at, final.document.model_dump_json())
    invoices = Invoices(shop.store)
    invoices.pay(final.number, at=DECEMBER, actor="ada", reason="wire 7")
    said = [(change.state, change.actor, change.reason) for change in invoices.history(final.number)]
    assert said == [
        ("draft", "system", "created"),
        ("review", "ada", ""),
        ("finalized", "ada", "checked"),
        ("paid", "ada", "wire 7"),
    ]
    actions = [entry.action for entry in Audit(shop.store).entries(tenant="acme", limit=4)]
    assert actions == ["invoice.paid", "invoice.finalized", "invoice.review", "invoice.create"]
    assert invoices.get("acme-2026-11-r1").number == final.number


def test_only_what_was_reviewed_becomes_final_and_only_after_its_month(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=True)
    invoices = Invoices(shop.store)
    draft = invoices.create("acme", MONTH, at=NOON)
    with pytest.raises(Conflict, match="a draft"):
        invoices.finalize(draft.number, at=DECEMBER)
    invoices.review(draft.number, at=NOON)
    with pytest.raises(Conflict, match="not over"):
        invoices.finalize(draft.number, at=NOON)
    buy(shop, 2, adapter=True)
    with pytest.raises(Conflict, match="something else by now"):
        invoices.finalize(draft.number, at=DECEMBER)
    invoices.create("acme", MONTH, at=DECEMBER)
    with pytest.raises(Conflict, match="superseded"):
        invoices.finalize(draft.number, at=DECEMBER)
    with pytest.raises(UnknownRecord):
        invoices.review("INV-2026-000009", at=DECEMBER)
    # None of this took a number or closed the month.
    assert finalize(shop).number == "INV-2026-000001"


def test_months_become_final_in_their_order(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=True)
    buy(shop, 2, adapter=True, days=20)
    with pytest.raises(Conflict, match=MONTH):
        finalize(shop, "2026-12", JANUARY)
    numbers = [finalize(shop, MONTH, JANUARY).number, finalize(shop, "2026-12", JANUARY).number]
    assert numbers == ["INV-2027-000001", "INV-2027-000002"]


def test_late_usage_is_on_the_next_invoice_and_says_so(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=True)
    final = finalize(shop)
    late = buy(shop, 2, adapter=True)  # settled in November, after November was closed
    own = buy(shop, 3, adapter=True, days=20)
    assert Invoices(shop.store).create("acme", MONTH, at=JANUARY) == final
    december = finalize(shop, "2026-12", JANUARY)
    assert [(line.late, line.amount_nanos) for line in december.document.lines] == [
        (None, own),
        (MONTH, late),
    ]
    assert december.document.lines[1].label == "acme/support, late usage of 2026-11"
    usage = InvoiceUsage(shop.store)
    assert [r.id for r in usage.requests(december, InvoiceFilter(line=2)).items] == ["r2"]
    assert [r.id for r in usage.requests(december, InvoiceFilter(line=1)).items] == ["r3"]


def test_the_account_agrees_with_the_invoices_to_the_nano(shop: BillingFixture) -> None:
    shop = tiered(
        shop, minimum_nanos=3_000_000, tax={"name": "VAT", "percent": "19"}, included={"prompt_tokens": 50}
    )
    listed = sum(buy(shop, number, adapter=False) for number in range(9))
    final = finalize(shop)
    document = final.document
    assert document.list_nanos == listed
    assert [line.kind for line in document.lines] == ["usage", "minimum"]
    assert document.subtotal_nanos == 3_000_000
    assert document.tax_nanos == 570_000
    assert spent(shop) == document.total_nanos == 3_570_000
    assert Invoices(shop.store).recalculate(final.number) == document


def spent(shop: BillingFixture) -> int:
    """Return what the account was charged, less what was refunded."""
    account = shop.ledger.account("acme")
    return account.spent_nanos - (account.credit_nanos - 1_000_000_000)


def test_a_graduated_month_is_refunded_what_its_requests_were_charged_too_much(shop: BillingFixture) -> None:
    shop = tiered(shop)
    listed = sum(buy(shop, number, adapter=False) for number in range(9))
    final = finalize(shop)
    assert final.document.total_nanos < listed
    assert spent(shop) == final.document.total_nanos


def test_credits_pay_promotions_before_tax_and_prepaid_money_after_it(shop: BillingFixture) -> None:
    shop = on_plan(shop, tax={"name": "VAT", "percent": "10"})
    credits = Credits(shop.store)
    promotion = credits.grant("acme", 10_000, kind="promotional", at=NOON)
    prepaid = credits.grant("acme", 20_000, kind="prepaid", at=NOON)
    credits.grant("acme", 20_000, kind="line", at=NOON)
    cost = buy(shop, 1, adapter=False)
    document = finalize(shop).document
    assert [(credit.grant, credit.amount_nanos) for credit in document.credits] == [
        (promotion.id, 10_000),
        (prepaid.id, min(20_000, document.total_nanos)),
    ]
    assert document.tax_nanos == (cost - 10_000 + 5) // 10
    assert document.total_nanos == cost - 10_000 + document.tax_nanos
    # Whatever came later changes nothing: the same document, at any time.
    buy(shop, 2, adapter=False, days=20)
    finalize(shop, "2026-12", JANUARY)
    again = Invoices(shop.store).recalculate("INV-2026-000001")
    assert again == document


def test_prepaid_money_pays_each_month_only_once(shop: BillingFixture) -> None:
    grant = Credits(shop.store).grant("acme", 30_000, kind="prepaid", at=NOON)
    buy(shop, 1, adapter=False)
    buy(shop, 2, adapter=False, days=20)
    documents = [finalize(shop, MONTH, JANUARY).document, finalize(shop, "2026-12", JANUARY).document]
    paid = [document.credited_nanos("prepaid") for document in documents]
    assert sum(paid) == grant.amount_nanos
    assert documents[1].due_nanos == documents[1].total_nanos - paid[1] > 0


def test_a_payment_is_posted_once_and_what_was_credited_is_not_due(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=False, times=1000)
    final = finalize(shop)
    CreditNotes(shop.store).issue(final.number, [(None, 10_000_000)], reason="slow", at=DECEMBER)
    before = shop.ledger.account("acme").credit_nanos
    invoices = Invoices(shop.store)
    invoices.pay(final.number, at=DECEMBER)
    assert shop.ledger.account("acme").credit_nanos == before + final.document.payable_nanos - 10_000_000
    with pytest.raises(Conflict, match="paid"):
        invoices.pay(final.number, at=DECEMBER)
    with pytest.raises(Conflict, match="paid"):
        invoices.void(final.number, at=DECEMBER)


def test_a_void_invoice_is_reversed_and_its_month_gets_a_new_one(shop: BillingFixture) -> None:
    shop = tiered(shop)
    listed = sum(buy(shop, number, adapter=False) for number in range(9))
    first = finalize(shop)
    invoices = Invoices(shop.store)
    invoices.void(first.number, at=DECEMBER, reason="wrong buyer")
    assert spent(shop) == listed
    late = buy(shop, 20, adapter=False)
    second = finalize(shop)
    assert second.number == "INV-2026-000002"
    assert second.document == first.document  # the month stayed closed: late usage is December's
    assert spent(shop) == second.document.total_nanos + late
    assert invoices.get(first.number).state == InvoiceState.VOID
    assert invoices.create("acme", MONTH, at=JANUARY) == second


def test_a_draft_is_not_credited(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=False)
    draft = Invoices(shop.store).create("acme", MONTH, at=DECEMBER)
    with pytest.raises(Conflict, match="final"):
        CreditNotes(shop.store).issue(draft.number, [(None, 1)], reason="x", at=DECEMBER)


@pytest.mark.parametrize("table", [invoices_table, states_table, finals_table, notes_table])
@pytest.mark.parametrize("verb", ["update", "delete", "replace"])
def test_the_store_itself_keeps_what_is_final(shop: BillingFixture, table: sa.Table, verb: str) -> None:
    buy(shop, 1, adapter=False, times=1000)
    final = finalize(shop)
    CreditNotes(shop.store).issue(final.number, [(None, 10_000_000)], reason="x", at=DECEMBER)
    column = next(iter(table.primary_key))
    statement: sa.Executable = table.delete()
    if verb == "update":
        statement = table.update().values({column.name: column})
    if verb == "replace":
        if shop.store.url.startswith("postgres"):
            pytest.skip("only SQLite has it")
        statement = sa.text(f"INSERT OR REPLACE INTO {table.name} SELECT * FROM {table.name}")
    with pytest.raises(sa.exc.DBAPIError, match="never change"), shop.store.write() as connection:
        connection.execute(statement)


def test_invoices_that_become_final_at_once_are_numbered_without_gaps(shop: BillingFixture) -> None:
    invoices, names = Invoices(shop.store), [f"t{n}" for n in range(6)]
    for name in names:
        shop.tenants.create(name, at=NOON)
        shop.ledger.open_account(name, 1)
        draft = invoices.create(name, MONTH, at=DECEMBER)
        invoices.review(draft.number, at=DECEMBER)

    def run(name: str) -> None:
        invoices.finalize(f"{name}-{MONTH}-r1", at=DECEMBER)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    numbers = sorted(invoices.get(f"{name}-{MONTH}-r1").number for name in names)
    assert numbers == [f"INV-2026-{n:06d}" for n in range(1, 7)]


def test_of_two_who_finalize_one_invoice_one_does(shop: BillingFixture) -> None:
    shop = tiered(shop)
    for number in range(9):
        buy(shop, number, adapter=False)
    invoices, outcomes = Invoices(shop.store), []
    draft = invoices.create("acme", MONTH, at=DECEMBER)
    invoices.review(draft.number, at=DECEMBER)

    def run() -> None:
        try:
            outcomes.append(invoices.finalize(draft.number, at=DECEMBER).number)
        except Conflict:
            outcomes.append("refused")

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["INV-2026-000001", *["refused"] * 3]
    with shop.store.read() as connection:
        kinds = sa.select(sa.func.count()).where(transfers_table.c.request_id == "INV-2026-000001")
        assert connection.execute(kinds).scalar() == 1


def test_a_line_is_followed_to_its_days_keys_and_requests(shop: BillingFixture) -> None:
    for number in range(5):
        buy(shop, number, adapter=number == 4, days=number % 2)
    with shop.store.write() as connection:
        made = Charge("training:1", "acme", "training", "acme/support@1", 1000, shop.price.id, 77, NOON)
        assert post_charge(connection, made)
    final, usage = finalize(shop), InvoiceUsage(shop.store)
    lines = final.document.lines
    assert [line.kind for line in lines] == ["usage", "usage", "training"]
    for position, line in enumerate(lines[:2], 1):
        days = usage.sums(final, "day", InvoiceFilter(line=position))
        assert sum(day.cost_nanos for day in days) == line.amount_nanos
        (key,) = usage.sums(final, "key", InvoiceFilter(line=position))
        assert (key.group, key.requests) == (shop.principal.key_id, line.requests)
    day = datetime(2026, 11, 22, tzinfo=UTC)
    first = usage.requests(final, InvoiceFilter(line=2, day=day), limit=1)
    rest = usage.requests(final, InvoiceFilter(line=2, day=day), after=first.items[0].id, limit=5)
    assert ([r.id for r in [*first.items, *rest.items]], first.has_more) == (["r0", "r2"], True)
    assert first.items[0].price == "standard v1"
    (training,) = usage.requests(final, InvoiceFilter(line=3)).items
    assert (training.id, training.cost_nanos) == ("training:1", 77)
    with pytest.raises(Conflict, match="no line 4"):
        usage.requests(final, InvoiceFilter(line=4))
    with pytest.raises(InvalidRequest):
        usage.requests(final, after="nothing")


def test_invoices_are_listed_newest_first_by_tenant_state_and_month(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=False)
    final, invoices = finalize(shop), Invoices(shop.store)
    draft = invoices.create("acme", "2026-12", at=JANUARY)
    assert [invoice.number for invoice in invoices.page().items] == [draft.number, final.number]
    assert [i.number for i in invoices.page(states=[InvoiceState.FINALIZED]).items] == [final.number]
    assert [i.number for i in invoices.page(period="2026-12").items] == [draft.number]
    assert [i.number for i in invoices.page(after=draft.number).items] == [final.number]
    assert invoices.page(tenant="rival").items == []
    with pytest.raises(InvalidRequest):
        invoices.page(tenant="rival", after=draft.number)
    with pytest.raises(UnknownRecord):
        invoices.get(final.number, tenant="rival")


def test_a_tenant_is_billed_in_one_currency(shop: BillingFixture) -> None:
    prices = Prices(shop.store)
    prices.publish(PLAN.model_copy(update={"name": "euro", "currency": "EUR"}), at=NOON)
    with pytest.raises(Conflict, match="USD"):
        prices.subscribe("acme", "euro", at=NOON + timedelta(days=1))
