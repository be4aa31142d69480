"""What a month will have cost at its end, if the days that are left are like the last ones.

The projection is the month to date plus, for each day that is left of the month (the rest of today is part of
a day), the mean of the last seven full days (UTC). Days before the first that was charged for are left out: a
new customer's mean is not thinned by days before they came. The range takes the cheapest and the dearest of
those days instead of their mean. Amounts are at list price, as in `Costs`.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from serve.billing.metering.queries import DAY, CostBucket, CostQueries, UsageQuery, floor
from serve.storage.database import Store

BASIS_DAYS = 7
MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Projection:
    """Nano-USD. `line_item` is a model and tier, or a charge; None for the total."""

    line_item: str | None
    to_date_nanos: int
    projected_nanos: int
    low_nanos: int
    high_nanos: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """`basis_days` full days were the basis, 0 to 7; without any the projection is the month to date."""

    month: datetime
    month_end: datetime
    at: datetime
    basis_days: int
    total: Projection
    line_items: tuple[Projection, ...]


@dataclass(frozen=True, slots=True)
class _Basis:
    """What is known of the month: its start, the full days that count, and how long is left of it."""

    month: datetime
    days: tuple[datetime, ...]
    left: timedelta

    def project(self, line_item: str | None, costs: Iterable[CostBucket]) -> Projection:
        daily = _daily(costs)
        to_date = sum(nanos for day, nanos in daily.items() if day >= self.month)
        if not self.days:
            return Projection(line_item, to_date, to_date, to_date, to_date)
        full = [daily.get(day, 0) for day in self.days]
        mean = to_date + sum(full) * (self.left // MICROSECOND) // (len(full) * (DAY // MICROSECOND))
        low, high = (
            to_date + one * (self.left // MICROSECOND) // (DAY // MICROSECOND)
            for one in (min(full), max(full))
        )
        return Projection(line_item, to_date, mean, low, high)


def forecast(store: Store, *, tenant: str | None, at: datetime) -> Forecast:
    """Of the month (UTC) that `at` is in; without `tenant` of all of them. Raises StoreUnavailable."""
    today = floor(at, DAY)
    month = today.replace(day=1)
    month_end = (month + 32 * DAY).replace(day=1)
    earliest = today - BASIS_DAYS * DAY
    question = UsageQuery(min(month, earliest), at, tenants=(tenant,) if tenant else ())
    costs = CostQueries(store).query(question, line_items=True)
    first = max(min((*_daily(costs), today)), earliest)
    days = tuple(first + number * DAY for number in range((today - first) // DAY))
    basis = _Basis(month, days, month_end - at)
    by_item: dict[str, list[CostBucket]] = defaultdict(list)
    for cost in costs:
        by_item[cost.line_item or ""].append(cost)
    items = tuple(basis.project(item, of_item) for item, of_item in sorted(by_item.items()))
    return Forecast(month, month_end, at, len(days), basis.project(None, costs), items)


def _daily(costs: Iterable[CostBucket]) -> dict[datetime, int]:
    daily: dict[datetime, int] = defaultdict(int)
    for cost in costs:
        daily[cost.bucket] += cost.nanos
    return daily
