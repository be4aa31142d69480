"""Forecasts a month's cost from the last days.

The projection is the month to date plus, for each remaining day, the mean of the last seven full days
(UTC). The rest of today counts as part of a day. Days before the first charge are left out, so they do not
lower a new customer's mean. The range uses the cheapest and the dearest of those days instead of their mean.
Amounts are at list price, as in `CostQueries`.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from serve.billing.metering.queries import DAY, CostBucket, CostQueries, UsageQuery, floor
from serve.billing.money import DEFAULT_CURRENCY
from serve.billing.pricing.currencies import currency_of
from serve.storage.database import Store

BASIS_DAYS = 7
MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Projection:
    """Projects one line item in nanos of its currency.

    `line_item` is a model and tier or a charge; None is the total of the currency.
    """

    line_item: str | None
    currency: str
    to_date_nanos: int
    projected_nanos: int
    low_nanos: int
    high_nanos: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """Projects a month, with a total per currency.

    `basis_days` is 0 to 7 full days; with 0 the projection is the month to date.
    """

    month: datetime
    month_end: datetime
    at: datetime
    basis_days: int
    totals: tuple[Projection, ...]
    line_items: tuple[Projection, ...]


@dataclass(frozen=True, slots=True)
class _Basis:
    """Holds the month's start, the full days that the forecast is based on, and the remaining time."""

    month: datetime
    days: tuple[datetime, ...]
    left: timedelta

    def project(self, line_item: str | None, currency: str, costs: Iterable[CostBucket]) -> Projection:
        daily = _daily(costs)
        to_date = sum(nanos for day, nanos in daily.items() if day >= self.month)
        if not self.days:
            return Projection(line_item, currency, to_date, to_date, to_date, to_date)
        daily_nanos = [daily.get(day, 0) for day in self.days]
        mean = to_date + sum(daily_nanos) * (self.left // MICROSECOND) // (
            len(daily_nanos) * (DAY // MICROSECOND)
        )
        low, high = (
            to_date + day_nanos * (self.left // MICROSECOND) // (DAY // MICROSECOND)
            for day_nanos in (min(daily_nanos), max(daily_nanos))
        )
        return Projection(line_item, currency, to_date, mean, low, high)


def forecast(store: Store, *, tenant: str | None, at: datetime) -> Forecast:
    """Forecast the month (UTC) that contains `at`, for `tenant` or for all. Raises StoreUnavailable."""
    today = floor(at, DAY)
    month = today.replace(day=1)
    month_end = (month + 32 * DAY).replace(day=1)
    earliest = today - BASIS_DAYS * DAY
    usage_query = UsageQuery(min(month, earliest), at, tenants=(tenant,) if tenant else ())
    costs = CostQueries(store).query(usage_query, line_items=True)
    first = max(min((*_daily(costs), today)), earliest)
    days = tuple(first + number * DAY for number in range((today - first) // DAY))
    basis = _Basis(month, days, month_end - at)
    by_item: dict[tuple[str, str], list[CostBucket]] = defaultdict(list)
    by_currency: dict[str, list[CostBucket]] = defaultdict(list)
    for cost in costs:
        by_item[cost.line_item or "", cost.currency].append(cost)
        by_currency[cost.currency].append(cost)
    if not by_currency:
        by_currency[_currency(store, tenant)] = []
    totals = tuple(basis.project(None, code, costs) for code, costs in sorted(by_currency.items()))
    items = tuple(basis.project(item, code, costs) for (item, code), costs in sorted(by_item.items()))
    return Forecast(month, month_end, at, len(days), totals, items)


def _currency(store: Store, tenant: str | None) -> str:
    if tenant is None:
        return DEFAULT_CURRENCY
    with store.read() as connection:
        return currency_of(connection, tenant)


def _daily(costs: Iterable[CostBucket]) -> dict[datetime, int]:
    daily: dict[datetime, int] = defaultdict(int)
    for cost in costs:
        daily[cost.bucket] += cost.nanos
    return daily
