"""Converts money between text and integers. Inside, money is always an integer of nanos of a currency.

A currency's smallest unit is ISO 4217's: a cent, a whole yen, a thousandth of a dinar.
"""

from decimal import ROUND_HALF_EVEN, Decimal
from functools import lru_cache

from iso4217 import Currency

NANOS, NANO_DIGITS = 1_000_000_000, 9
DEFAULT_CURRENCY = "USD"  # of a tenant that has no plan yet
# Of a currency that ISO 4217 has withdrawn since its plan was published: nearly all of them have cents.
_WITHDRAWN_DIGITS = 2


def check_currency(code: str) -> str:
    """Return `code`. Raises ValueError unless it is a currency in use, which has a smallest unit."""
    if _digits_of(code) is None:
        raise ValueError(f"'{code}' is not a currency of ISO 4217 that money is counted in")
    return code


def digits(currency: str) -> int:
    """Return the decimals of the currency's smallest unit: USD 2, JPY 0, KWD 3, CLF 4."""
    known_digits = _digits_of(currency)
    return _WITHDRAWN_DIGITS if known_digits is None else known_digits


def unit_nanos(currency: str) -> int:
    """Return the nanos of the currency's smallest unit."""
    return int(10 ** (NANO_DIGITS - digits(currency)))


def nanos_of(amount: str) -> int:
    """Return the nanos of a decimal string such as "12.50". Raises ValueError if it is not one."""
    try:
        nanos = Decimal(amount) * NANOS
    except ArithmeticError as error:
        raise ValueError(f"not an amount: {amount!r}") from error
    if not nanos.is_finite() or nanos != nanos.to_integral_value() or abs(nanos) > 10**18:
        raise ValueError(f"not an amount with at most nine decimals: {amount!r}")
    return int(nanos)


def exact(nanos: int, currency: str) -> str:
    """Return the exact amount, with at least the currency's decimals: 123400 → "0.0001234" USD."""
    sign, whole, part = "-" if nanos < 0 else "", *divmod(abs(nanos), NANOS)
    decimals = f"{part:09d}".rstrip("0").ljust(digits(currency), "0")
    return f"{sign}{whole}.{decimals}" if decimals else f"{sign}{whole}"


def labelled(nanos: int, currency: str) -> str:
    """Return the exact amount and its currency: "0.13 USD"."""
    return f"{exact(nanos, currency)} {currency}"


def round_nanos(nanos: int, currency: str) -> int:
    """Return the amount in whole smallest units of the currency, rounded half to even, in nanos."""
    unit = unit_nanos(currency)
    return int((Decimal(nanos) / unit).quantize(Decimal(1), ROUND_HALF_EVEN)) * unit


def rounded(nanos: int, currency: str) -> str:
    """Return the amount rounded to the currency's smallest unit, half to even."""
    return exact(round_nanos(nanos, currency), currency)


@lru_cache(maxsize=1024)
def _digits_of(code: str) -> int | None:
    """Return the decimals of a currency in use; None for metals, testing codes and unknown ones."""
    try:
        return Currency(code).exponent if code.isascii() and code.isupper() else None
    except ValueError:
        return None
