"""Converts money between text and integers. Inside, money is always an integer of nano-USD."""

from decimal import ROUND_HALF_EVEN, Decimal

NANOS = 1_000_000_000


def nanos_of_usd(amount: str) -> int:
    """Return the nano-USD of a decimal string such as "12.50". Raises ValueError if it is not one."""
    try:
        nanos = Decimal(amount) * NANOS
    except ArithmeticError as error:
        raise ValueError(f"not an amount: {amount!r}") from error
    if not nanos.is_finite() or nanos != nanos.to_integral_value() or abs(nanos) > 10**18:
        raise ValueError(f"not an amount in whole nano-USD: {amount!r}")
    return int(nanos)


def usd(nanos: int) -> str:
    """Return the exact amount, with at least two and at most nine decimals: 123400 → "0.0001234"."""
    sign, whole, part = "-" if nanos < 0 else "", *divmod(abs(nanos), NANOS)
    decimals = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals}"


def cents(nanos: int) -> str:
    """Return the payable amount, rounded to cents, half to even."""
    return str((Decimal(nanos) / NANOS).quantize(Decimal("0.01"), ROUND_HALF_EVEN))
