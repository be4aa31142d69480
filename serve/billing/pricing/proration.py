"""Prorates a month's minimum and included tokens by the days on which plans were in force.

A day (UTC) belongs to the plan version in force at its end. So the day on which a tenant begins counts whole,
and a day on which it changes its plan counts once. The last version of the month decides: with `proration:
day`, each version gives its days' share of its own minimum and included tokens, and days without a plan give
nothing. With `none`, the last version gives its whole minimum and included tokens, whenever it began.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.pricing.plans import Included, Prices, PriceVersion, Proration, subscriptions_table

DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class DaysInForce:
    """Names the days from `begin` to before `end` of a month, from 0, on which a version was in force."""

    price: PriceVersion
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class PlanShare:
    """Holds what a version gives to the month in which it was in force for `days`."""

    price: PriceVersion
    days: int
    minimum_nanos: int
    included: Included


@dataclass(frozen=True, slots=True)
class MonthTerms:
    """Holds a month's minimum and included tokens, and the shares of the versions that they add up from.

    `price` is the last version in force by the month's end; it sets the tax, too.
    """

    price: PriceVersion | None
    days_of_month: int
    shares: tuple[PlanShare, ...]

    @property
    def proration(self) -> Proration:
        return "none" if self.price is None else self.price.plan.proration

    @property
    def minimum_nanos(self) -> int:
        return sum(share.minimum_nanos for share in self.shares)

    @property
    def included(self) -> Included:
        return _added([share.included for share in self.shares])


def prorated(quantity: int, begin: int, end: int, days: int) -> int:
    """Return the share of `quantity` that the days from `begin` to before `end` of a month of `days` have.

    It is the difference of what the days up to `end` and those up to `begin` have, each rounded half up. So
    the shares of all days add up to the whole, however they are grouped.
    """
    return _until(quantity, end, days) - _until(quantity, begin, days)


def terms_of(in_force: Sequence[DaysInForce], price: PriceVersion | None, days_of_month: int) -> MonthTerms:
    """Return a month's terms. `price` is the last version in force by its end, which may be no more."""
    by_day = price is not None and price.plan.proration == "day"
    shares = []
    for version in {part.price.id: part.price for part in in_force}.values():
        parts = [part for part in in_force if part.price.id == version.id]
        if by_day:
            shares.append(_prorated_share(version, parts, days_of_month))
        elif version == price:
            shares.append(PlanShare(version, _days(parts), version.plan.minimum_nanos, version.plan.included))
    return MonthTerms(price, days_of_month, tuple(shares))


def month_terms(
    prices: Prices, connection: sa.Connection, tenant: str, start: datetime, end: datetime
) -> MonthTerms:
    """Return the terms of `tenant` for the month from `start` to `end`."""
    s = subscriptions_table.c
    query = sa.select(s.effective_at, s.plan_id).where(s.tenant_id == tenant, s.effective_at < end)
    subscriptions = connection.execute(query.order_by(s.effective_at, s.id)).all()
    versions = prices.by_id(connection)
    days_of_month = (end - start) // DAY
    in_force: list[DaysInForce] = []
    for day in range(days_of_month):
        begun = [row.plan_id for row in subscriptions if row.effective_at < start + (day + 1) * DAY]
        if not begun:
            continue
        if in_force and in_force[-1].price.id == begun[-1] and in_force[-1].end == day:
            begin = in_force.pop().begin
        else:
            begin = day
        in_force.append(DaysInForce(versions[begun[-1]], begin, day + 1))
    last = versions[subscriptions[-1].plan_id] if subscriptions else None
    return terms_of(in_force, last, days_of_month)


def _prorated_share(version: PriceVersion, parts: Sequence[DaysInForce], days_of_month: int) -> PlanShare:
    plan = version.plan
    return PlanShare(
        version,
        _days(parts),
        sum(prorated(plan.minimum_nanos, part.begin, part.end, days_of_month) for part in parts),
        _added([_prorated_tokens(plan.included, part, days_of_month) for part in parts]),
    )


def _prorated_tokens(included: Included, part: DaysInForce, days_of_month: int) -> Included:
    return Included(
        **{
            name: prorated(quantity, part.begin, part.end, days_of_month)
            for name, quantity in included.model_dump().items()
        }
    )


def _days(parts: Sequence[DaysInForce]) -> int:
    return sum(part.end - part.begin for part in parts)


def _added(parts: Sequence[Included]) -> Included:
    sums: Counter[str] = Counter()
    for included in parts:
        sums.update(included.model_dump())
    return Included(**sums)


def _until(quantity: int, day: int, days: int) -> int:
    return (2 * quantity * day + days) // (2 * days)
