"""Prorates a month's minimum and included tokens by the days on which plans were in force.

A day (UTC) belongs to the plan version in force at its end. So the day on which a tenant begins counts whole,
and a day on which it changes its plan counts once. The last version of the month decides: with `proration:
day`, each version gives its days' share of its own minimum and included tokens, and days without a plan give
nothing. With `none`, the last version gives its whole minimum and included tokens, whenever it began.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from serve.billing.pricing.plans import Included, PriceVersion, Proration
from serve.billing.pricing.tables import subscriptions_table

DAY = timedelta(days=1)


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
        sums: Counter[str] = Counter()
        for share in self.shares:
            sums.update(share.included.model_dump())
        return Included(**sums)


def prorated(quantity: int, begin: int, end: int, days: int) -> int:
    """Return the share of `quantity` that the days from `begin` to before `end` of a month of `days` have.

    It is the difference of what the days up to `end` and those up to `begin` have, each rounded half up. So
    the shares of all days add up to the whole, however they are grouped.
    """
    return _until(quantity, end, days) - _until(quantity, begin, days)


def terms_of(in_force: Sequence[PriceVersion | None], price: PriceVersion | None) -> MonthTerms:
    """Return the terms of a month in which, day by day, the versions `in_force` were in force.

    `price` is the last version that was in force by the month's end, even if it ended.
    """
    days_of: dict[int, list[int]] = defaultdict(list)
    for day, version in enumerate(in_force):
        if version is not None:
            days_of[version.id].append(day)
    shares = []
    for version in {version.id: version for version in in_force if version is not None}.values():
        days, plan = days_of[version.id], version.plan
        if price is not None and price.plan.proration == "day":
            shares.append(_prorated_share(version, days, len(in_force)))
        elif price is not None and price.id == version.id:
            shares.append(PlanShare(version, len(days), plan.minimum_nanos, plan.included))
    return MonthTerms(price, len(in_force), tuple(shares))


def month_terms(
    versions: Mapping[int, PriceVersion],
    connection: sa.Connection,
    tenant: str,
    start: datetime,
    end: datetime,
) -> MonthTerms:
    """Return the terms of `tenant` for the month from `start` to `end`. `versions` are all, by id."""
    s = subscriptions_table.c
    query = sa.select(s.effective_at, s.plan_id).where(s.tenant_id == tenant, s.effective_at < end)
    subscriptions = connection.execute(query.order_by(s.effective_at, s.id)).all()
    in_force: list[PriceVersion | None] = []
    for day in range((end - start) // DAY):
        begun = [row.plan_id for row in subscriptions if row.effective_at < start + (day + 1) * DAY]
        in_force.append(versions[begun[-1]] if begun and begun[-1] is not None else None)
    plan_ids = [row.plan_id for row in subscriptions if row.plan_id is not None]
    return terms_of(in_force, versions[plan_ids[-1]] if plan_ids else None)


def _prorated_share(version: PriceVersion, days: Sequence[int], days_of_month: int) -> PlanShare:
    def share(quantity: int) -> int:
        return sum(prorated(quantity, day, day + 1, days_of_month) for day in days)

    included = {name: share(quantity) for name, quantity in version.plan.included.model_dump().items()}
    return PlanShare(version, len(days), share(version.plan.minimum_nanos), Included(**included))


def _until(quantity: int, day: int, days: int) -> int:
    return (2 * quantity * day + days) // (2 * days)
