"""Months, which is what is billed: "2026-11" is [1 November, 1 December) in UTC."""

import calendar
import re
from datetime import UTC, datetime

from serve.errors import OperatorError


def period_bounds(period: str) -> tuple[datetime, datetime]:
    """[start, end) of the month "YYYY-MM" in UTC. Raises OperatorError if it is not a month."""
    if not re.fullmatch(r"[0-9]{4}-(0[1-9]|1[0-2])", period) or period.startswith("0000"):
        raise OperatorError(f"'{period}' is not a month; write it as 2026-11.")
    year, month = int(period[:4]), int(period[5:])
    if (year, month) == (9999, 12):
        raise OperatorError(f"'{period}' is too far away.")
    start = datetime(year, month, 1, tzinfo=UTC)
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return start, datetime(*following, 1, tzinfo=UTC)


def period_name(period: str) -> str:
    start, _ = period_bounds(period)
    return f"{calendar.month_name[start.month]} {start.year}"
