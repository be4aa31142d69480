"""A CSV export opens in a spreadsheet as text and numbers, whatever names the tenants chose."""

import csv
import io
from pathlib import Path

import pytest

import serve
from serve.billing.spreadsheet import csv_text, defused


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        '=HYPERLINK("http://x")',
        "+1",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        "\uff1d1",
        "-",
        "-1e5",
    ],
)
def test_a_cell_that_begins_like_a_formula_is_text(text: str) -> None:
    assert defused(text) == f"'{text}"


@pytest.mark.parametrize("value", ["acme/support", "-1.50", "0.00", "-3", "", "a=b", "東京", 5, -5, None])
def test_numbers_and_plain_text_stay_as_they_are(value: object) -> None:
    assert defused(value) == value


def test_excel_sees_the_encoding_and_every_cell_comes_back() -> None:
    text = csv_text(
        ("name", "amount", "note"), [{"name": '東京, "a"\n=b', "amount": "-1.50"}, {"note": "=1"}]
    )
    encoded = text.encode()
    assert encoded.startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(encoded.decode("utf-8-sig"))))
    assert rows == [
        {"name": '東京, "a"\n=b', "amount": "-1.50", "note": ""},
        {"name": "", "amount": "", "note": "'=1"},
    ]


def test_every_csv_of_the_service_is_written_here() -> None:
    root = Path(serve.__file__).parent
    writers = {path.name for path in root.rglob("*.py") if "import csv\n" in path.read_text(encoding="utf-8")}
    assert writers == {"spreadsheet.py"}
