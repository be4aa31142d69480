"""Credit notes in the currency's smallest unit: bounded, and complete once all is credited."""

from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.billing.invoicing.credit_notes import CreditNotes, NoteDocument, credit
from serve.billing.invoicing.document import CreditApplied, InvoiceDocument, InvoiceLine, TaxApplied
from serve.billing.invoicing.invoices import Invoices
from serve.billing.money import unit_nanos
from serve.billing.pricing.plans import Tax
from serve.errors import Conflict, InvalidRequest
from tests.serve.billing.invoicing.test_calculation import buy
from tests.serve.billing.invoicing.test_invoices import DECEMBER, finalize, on_plan, spent
from tests.support.billing_fixture import BillingFixture

CENT = 10_000_000


def invoice(
    *nanos: int, percent: str = "20", currency: str = "USD", promotional: int = 0, prepaid: int = 0
) -> InvoiceDocument:
    taxable = sum(nanos) - promotional
    tax = Tax(name="VAT", percent=percent).nanos(taxable)
    return InvoiceDocument(
        tenant="acme",
        period="2026-11",
        currency=currency,
        lines=tuple(InvoiceLine(model="m", price="p v1", list_nanos=n, amount_nanos=n) for n in nanos),
        credits=(
            CreditApplied(grant="a", kind="promotional", amount_nanos=promotional),
            CreditApplied(grant="b", kind="prepaid", amount_nanos=prepaid),
        ),
        tax=TaxApplied(name="VAT", percent=percent, taxable_nanos=taxable, amount_nanos=tax),
    )


def note(document: InvoiceDocument, notes: list[NoteDocument], *amounts: tuple[int | None, int]) -> int:
    """Append a note to `notes` and return its amount."""
    notes.append(credit(document, "INV-1", notes, amounts, reason="x"))
    return notes[-1].amount_nanos


@given(
    st.lists(st.integers(0, 10**11), min_size=1, max_size=5),
    st.sampled_from(["0", "7.7", "20", "100"]),
    st.sampled_from(["USD", "JPY", "KWD", "CLF"]),
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 10**4)), max_size=12),
    st.integers(0, 100),
    st.booleans(),
)
def test_no_notes_exceed_the_invoice_and_all_of_them_give_back_exactly_what_was_paid_and_its_tax(
    nanos: list[int],
    percent: str,
    currency: str,
    asked: list[tuple[int, int]],
    prepaid_pct: int,
    promoted: bool,
) -> None:
    document = invoice(*nanos, percent=percent, currency=currency, promotional=sum(nanos) // 3 * promoted)
    prepaid = document.total_nanos * prepaid_pct // 100
    document = document.model_copy(
        update={
            "credits": (*document.credits[:1], CreditApplied(grant="b", kind="prepaid", amount_nanos=prepaid))
        }
    )
    unit, whole, notes = unit_nanos(currency), document.creditable_nanos, list[NoteDocument]()
    for position, units in asked:
        with suppress(Conflict):
            note(document, notes, (position or None, units * unit))
        assert sum(n.amount_nanos for n in notes) <= whole
        assert sum(n.tax_nanos for n in notes) <= document.tax_nanos
    for position, amount in enumerate(nanos, 1):
        credited = sum(line.amount_nanos for n in notes for line in n.lines if line.line == position)
        gross = Fraction(amount * document.total_nanos, max(document.subtotal_nanos, 1))
        assert credited == 0 or credited < gross + unit
    if rest := whole - sum(n.amount_nanos for n in notes):
        note(document, notes, (None, rest))
    assert all(n.amount_nanos % unit == 0 and 0 <= n.tax_nanos <= n.amount_nanos for n in notes)
    assert sum(n.amount_nanos for n in notes) == whole
    if whole:
        assert sum(n.tax_nanos for n in notes) == document.tax_nanos
    if not prepaid:
        assert whole == document.payable_nanos
    with pytest.raises(Conflict):
        note(document, notes, (None, unit))


def test_what_was_paid_by_rounding_up_can_be_given_back() -> None:
    document, notes = invoice(128_000_000, percent="0"), list[NoteDocument]()
    assert note(document, notes, (1, 130_000_000)) == document.payable_nanos == 130_000_000


def test_four_lines_credited_in_cents_all_succeed_and_the_last_takes_what_is_left() -> None:
    document, notes = invoice(*[104_200_000] * 4), list[NoteDocument]()  # gross 0.12504 each, 0.50016 in all
    amounts = [note(document, notes, (line, 13 * CENT)) for line in (1, 2, 3, 4)]
    assert amounts == [13 * CENT, 13 * CENT, 13 * CENT, 11 * CENT]
    assert sum(amounts) == document.payable_nanos
    assert sum(n.tax_nanos for n in notes) == document.tax_nanos


@pytest.mark.parametrize(
    ("amounts", "error", "message"),
    [
        ([(1, 50 * 10**9)], Conflict, "Line 1 can be credited up to 0.01 USD, not 50.00 USD"),
        ([(None, 200 * 10**9)], Conflict, "The invoice can be credited up to 100.01 USD, not 200.00 USD"),
        ([(1, CENT), (1, CENT)], Conflict, "Line 1 can be credited up to 0.00 USD"),
        ([(3, CENT)], Conflict, "no line 3"),
        ([], Conflict, "at least one"),
        ([(None, 1)], InvalidRequest, "steps of 0.01 USD, not 0.000000001 USD"),
        ([(None, 0)], InvalidRequest, "steps of 0.01 USD"),
        ([(None, -CENT)], InvalidRequest, "steps of 0.01 USD"),
    ],
)
def test_refusals_speak_in_the_currency(
    amounts: list[tuple[int | None, int]], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        credit(invoice(CENT, 10**11, percent="0"), "INV-1", [], amounts, reason="x")


def test_a_yen_is_not_parted() -> None:
    document = invoice(10**11, percent="10", currency="JPY")
    with pytest.raises(InvalidRequest, match=r"steps of 1 JPY, not 0\.5 JPY"):
        credit(document, "INV-1", [], [(None, 5 * 10**8)], reason="x")


def test_what_was_paid_in_advance_can_be_credited_too() -> None:
    document = invoice(10**9, percent="0", prepaid=10**9)
    assert (document.payable_nanos, document.creditable_nanos) == (0, 10**9)


def test_notes_are_numbered_posted_and_stand_against_a_void(shop: BillingFixture) -> None:
    shop = on_plan(shop, tax={"name": "VAT", "percent": "25"})
    buy(shop, 1, adapter=False, times=1000)
    notes, final = CreditNotes(shop.store), finalize(shop)
    whole = final.document.payable_nanos
    first = notes.issue(final.number, [(1, CENT), (None, CENT)], reason="outage", at=DECEMBER, actor="ada")
    assert (first.number, first.document.amount_nanos, first.document.tax_nanos) == (
        "CN-2026-000001",
        2 * CENT,
        0,  # 0.4 of a cent
    )
    with pytest.raises(Conflict):
        notes.issue(final.number, [(None, whole)], reason="more", at=DECEMBER)
    second = notes.issue(final.number, [(None, whole - 2 * CENT)], reason="all of it", at=DECEMBER)
    assert [n.number for n in notes.for_invoice(final.number)] == [first.number, second.number]
    assert first.document.tax_nanos + second.document.tax_nanos == final.document.tax_nanos
    assert spent(shop) == final.document.total_nanos - whole  # what rounding took
    with pytest.raises(Conflict, match="credit notes"):
        Invoices(shop.store).void(final.number, at=DECEMBER)
