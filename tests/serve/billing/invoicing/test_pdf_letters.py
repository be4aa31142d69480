# ruff: noqa: RUF001 (letters of many scripts are what this file is about)
import re
from dataclasses import replace
from io import BytesIO

import pytest
from fpdf.bidi import BidiParagraph
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pypdf import PdfReader

from serve.billing.invoicing.billing_details import SELLER, BillingDetails
from serve.billing.invoicing.credit_notes import CreditNotes
from serve.billing.invoicing.document import InvoiceDocument, InvoiceLine, Party, TaxApplied
from serve.billing.invoicing.invoices import Invoices
from serve.billing.invoicing.pdf import note_pdf_bytes, pdf_bytes
from serve.billing.invoicing.store import Invoice
from serve.billing.invoicing.text_layout import TextSheet, visual_order
from serve.billing.invoicing.typefaces import clusters, typeface_of, typefaces_of, unprintable
from serve.billing.pricing.plans import Prices, Tax
from serve.errors import Conflict, InvalidRequest
from tests.serve.billing.invoicing.test_calculation import MONTH, buy
from tests.serve.billing.invoicing.test_invoices import DECEMBER, finalize
from tests.support.billing_fixture import BillingFixture
from tests.support.constants import NOON, PLAN
from tests.support.databases import on_sqlite

WORDS = {
    "Chinese": "北京示例科技有限公司",
    "Traditional": "臺灣範例股份有限公司",
    "Japanese": "株式会社サンプル神﨑",
    "Korean": "주식회사예시",
    "Cyrillic": "Ромашка",
    "Greek": "Παράδειγμα",
    "Polish": "Łódź",
    "Vietnamese": "Nguyễn",
    "Arabic": "شركة",
    "Hebrew": "דוגמה",
    "Persian": "پژوهش",
    "Thai": "ตัวอย่าง",
    "Devanagari": "नमस्ते",
    "Armenian": "Օրինակ",
    "Georgian": "მაგალითი",
    "currencies": "€₹₽₪",
}


def invoice(name: str, address: str = "", tax: str = "VAT") -> Invoice:
    line = InvoiceLine(model="tiny", price="standard 1", list_nanos=1, amount_nanos=1)
    document = InvoiceDocument(
        tenant="acme",
        period=MONTH,
        currency="USD",
        seller=Party(name="Bespoke GmbH"),
        buyer=Party(name=name, address=address),
        lines=(line,),
        tax=TaxApplied(name=tax, percent="19", taxable_nanos=1, amount_nanos=0),
    )
    return Invoice(1, document, 1, NOON)


def text_of(pdf: bytes) -> str:
    """Return the text as pypdf reads it, without the spaces that it puts between wide letters."""
    return "".join(page.extract_text() for page in PdfReader(BytesIO(pdf)).pages).replace(" ", "")


def text_as_typed(pdf: bytes) -> str:
    """Return what the PDF says that was typed, where letters are joined or turned."""
    content = PdfReader(BytesIO(pdf)).pages[0].get_contents().get_data().decode("latin-1")
    return "|".join(
        bytes.fromhex(text).decode("utf-16") for text in re.findall("ActualText <(.*?)>", content)
    )


def fonts_of(pdf: bytes) -> list[str]:
    fonts = PdfReader(BytesIO(pdf)).pages[0]["/Resources"]["/Font"]
    return [font.get_object()["/BaseFont"] for font in fonts.values()]


def test_every_script_is_on_the_pdf_as_it_was_written() -> None:
    pdf = pdf_bytes(invoice("北京示例科技", "\n".join(f"({word}) 12" for word in WORDS.values())))
    text, typed = text_of(pdf), text_as_typed(pdf)
    assert "北京示例科技" in text  # in bold, which the font does not have
    for script, word in WORDS.items():
        assert word in text or word in typed, script
    assert len(pdf) < 150_000


def test_fonts_are_carried_whatever_the_machine_has_and_latin_needs_none() -> None:
    carried = fonts_of(pdf_bytes(invoice("Łódź 東京")))
    assert {name[:5] for name in carried} == {"/MPDF"}
    assert all(name.startswith("/Helvetica") for name in fonts_of(pdf_bytes(invoice("Käse & Söhne"))))


def test_the_same_invoice_is_the_same_bytes() -> None:
    hebrew = invoice("חברת דוגמה 株式会社", "Παράδειγμα 5")
    assert pdf_bytes(hebrew) == pdf_bytes(hebrew)


def test_right_to_left_words_are_seen_in_their_order_and_numbers_stay_whole() -> None:
    text = text_of(pdf_bytes(invoice("Acme", "Customer שלום 123 עולם end\nרחוב הרצל 12, תל אביב 61580")))
    assert "Customerעולם123שלוםend" in text  # from the left, as the eye reads the line
    assert "61580אביבתל" in text


def test_an_english_line_that_begins_with_hebrew_runs_from_the_left() -> None:
    text = text_of(pdf_bytes(invoice("Acme", tax="מס")))
    assert "מס19%of" in text.replace("\u200e", "")


def test_each_line_of_an_address_has_its_own_direction() -> None:
    text = text_of(pdf_bytes(invoice("Acme", "רחוב הרצל\nBerlin (Mitte) 5.")))
    assert "Berlin(Mitte)5." in text


def test_a_page_number_in_a_name_is_a_name() -> None:
    for name in ("Acme {nb}", "Łódź {nb}"):
        assert "{nb}" in text_of(pdf_bytes(invoice(name)))
        assert "Page1of1" in text_of(pdf_bytes(invoice(name)))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 4), max_size=12))
def test_fragments_are_ordered_as_the_bidirectional_algorithm_orders_letters(levels: list[int]) -> None:
    paragraph = BidiParagraph("x" * len(levels))
    for character, level in zip(paragraph.characters, levels, strict=True):
        character.embedding_level = level
    expected = [character.character_index for character in paragraph.reorder_resolved_levels()]
    assert visual_order(list(zip(levels, range(len(levels)), strict=True))) == expected


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@example("e\u0301 مُحَمَّد क्षेत्र \U0001f468\u200d\U0001f469 \u202e 각 邉\U000e0100 \x85")
def test_every_letter_has_a_font_or_is_named(text: str) -> None:
    faces, missing = typefaces_of(text), set(unprintable(text))
    for cluster in clusters(text):
        plain = cluster == "\n" or " " <= cluster <= "~" or "\xa0" <= cluster <= "\xff"
        assert plain or (typeface_of(cluster, faces) is None) == (cluster in missing)


def test_whatever_can_be_printed_is_set_without_an_error() -> None:
    text = "\u0301e\u0301 مُحَمَّد (12) क्षेत्र\u200d a\u200fb\u00ad 각 神\ufa19 \ufeff\n\n ﷺ"
    printable = "".join(cluster for cluster in text if not unprintable(cluster))
    sheet = TextSheet(printable)
    sheet.add_page()
    sheet.set_font(sheet.family, "", 9)
    sheet.multi_cell(15, 5, printable)
    assert sheet.pdf().endswith(b"%%EOF\n")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("Acme 😀", "'😀' (U+1F600)"),
        ("a\u202eb", "U+202E"),
        ("\U00013000", "U+13000"),
        ("\ue000", "U+E000"),
        ("\u0085", "U+0085"),
        ("邉\U000e0100", "'邉\U000e0100' (U+9089 U+E0100)"),
    ],
)
@on_sqlite
def test_letters_that_no_font_has_are_refused_where_details_are_set(
    shop: BillingFixture, text: str, named: str
) -> None:
    parties = BillingDetails(shop.store)
    for field in ("name", "address", "payment"):
        with pytest.raises(InvalidRequest) as refusal:
            parties.put(SELLER, Party(**{"name": "Bespoke", field: text}))
        assert named in refusal.value.message
        assert (refusal.value.param, refusal.value.code) == (field, "unprintable_text")
    assert parties.get(SELLER) is None


@on_sqlite
def test_letters_that_no_font_has_are_refused_before_a_document_is_final(shop: BillingFixture) -> None:
    plan = PLAN.model_copy(update={"tax": Tax(name="VAT 😀", percent="19")})
    buy(replace(shop, price=Prices(shop.store).publish(plan, at=NOON)), 1, adapter=False)
    Prices(shop.store).subscribe("acme", PLAN.name, at=NOON)
    invoices = Invoices(shop.store)
    draft = invoices.create("acme", MONTH, at=DECEMBER)
    with pytest.raises(Conflict, match=r"cannot be printed.*'tax\.name': '😀' \(U\+1F600\)"):
        pdf_bytes(draft)
    invoices.review(draft.number, at=DECEMBER)
    with pytest.raises(Conflict, match="cannot be printed"):
        invoices.finalize(draft.number, at=DECEMBER)
    assert invoices.get(draft.number).final_number is None


@on_sqlite
def test_a_credit_notes_reason_is_printed_or_refused_before_it_counts(shop: BillingFixture) -> None:
    buy(shop, 1, adapter=False, times=40_000)
    final = finalize(shop)
    notes = CreditNotes(shop.store)
    with pytest.raises(Conflict, match="The credit note cannot be printed"):
        notes.issue(final.number, [(1, 10_000_000)], reason="sorry 🙏", at=DECEMBER)
    assert notes.for_invoice(final.number) == []
    note = notes.issue(final.number, [(1, 10_000_000)], reason="サービス停止", at=DECEMBER)
    assert note.number.endswith("000001")
    assert "サービス停止" in text_of(note_pdf_bytes(note, final))
