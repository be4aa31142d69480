"""Writes CSV that spreadsheets open as it is meant: every CSV export of `serve` comes from here.

A byte-order mark tells Excel that the text is UTF-8. A cell that a spreadsheet would run as a formula is text
(owasp.org/www-community/attacks/CSV_Injection): tenants choose the names of models, plans and taxes.
"""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence

BYTE_ORDER_MARK = "\ufeff"

# The full-width forms count as their ASCII letters in some locales.
_FORMULA = re.compile("[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return a header and `rows`. A column that a row lacks is empty."""
    buffer = io.StringIO()
    buffer.write(BYTE_ORDER_MARK)
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: defused(value) for name, value in row.items()} for row in rows)
    return buffer.getvalue()


def defused(value: object) -> object:
    """`value`, which begins with an apostrophe if a spreadsheet would run it. Numbers stay numbers."""
    if isinstance(value, str) and _FORMULA.match(value) and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value
