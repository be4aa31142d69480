"""Budgets: what a tenant, one of its projects or one of its keys may spend in a day, a month, or ever.

A hard budget is a conditional UPDATE in the hold's transaction, so it is never overshot, whichever gateways
are asked; a soft one is only counted, and its thresholds are told. A hold remembers the budgets that it
reserved from, so that it gives back there whatever was changed meanwhile.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from serve.errors import BudgetExceeded
from serve.storage.database import UtcDateTime, insert, metadata

SCOPES = ("tenant", "project", "key")
PERIODS = {"day": "%Y-%m-%d", "month": "%Y-%m", "total": "total"}

budgets_table = sa.Table(
    "budgets",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("scope", sa.String(8), nullable=False),
    sa.Column("subject", sa.String(63), nullable=False),
    sa.Column("period", sa.String(8), nullable=False),
    sa.Column("limit_nanos", sa.BigInteger, nullable=False),
    sa.Column("hard", sa.Boolean, nullable=False),
    sa.Column("notify_pcts", sa.String(64), nullable=False),
    sa.Column("webhook_url", sa.String(512)),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("retired_at", UtcDateTime),
    sa.CheckConstraint("limit_nanos >= 0", name="limit_not_negative"),
    sa.CheckConstraint(f"scope IN {SCOPES}", name="scope_known"),
    sa.CheckConstraint(f"period IN {tuple(PERIODS)}", name="period_known"),
    sa.Index("ix_budgets_tenant_id_subject", "tenant_id", "subject"),
)

spend_table = sa.Table(
    "budget_spend",
    metadata,
    sa.Column("budget_id", sa.ForeignKey("budgets.id"), primary_key=True),
    sa.Column("period", sa.String(10), primary_key=True),
    sa.Column("spent_nanos", sa.BigInteger, nullable=False),
    sa.Column("held_nanos", sa.BigInteger, nullable=False),
    sa.Column("notified_pct", sa.Integer, nullable=False),
    sa.CheckConstraint("held_nanos >= 0", name="held_not_negative"),
    sa.Index("ix_budget_spend_period", "period"),
)

Reservation = tuple[str, str]  # budget id, period


@dataclass(frozen=True, slots=True)
class Budget:
    """`subject` is the tenant's name, the project's id or the key's id, as `scope` says."""

    id: str
    tenant: str
    scope: str
    subject: str
    period: str
    limit_nanos: int
    hard: bool
    notify_pcts: tuple[int, ...]
    webhook_url: str | None
    created_at: datetime
    retired_at: datetime | None = None

    def period_at(self, at: datetime) -> str:
        """The name of the period, in UTC, that `at` falls into: 2026-11-24, 2026-11 or total."""
        return at.astimezone(UTC).strftime(PERIODS[self.period])

    def reached_pct(self, spent_nanos: int) -> int:
        """The highest threshold that `spent_nanos` reaches; 0 if none."""
        reached = (pct for pct in self.notify_pcts if spent_nanos * 100 >= pct * self.limit_nanos)
        return max(reached, default=0) if spent_nanos else 0

    def binds(self, tenant: str, project: str | None, key_id: str | None) -> bool:
        subjects = {"tenant": tenant, "project": project, "key": key_id}
        return tenant == self.tenant and subjects[self.scope] == self.subject


def budget_of(row: "sa.Row[tuple[object, ...]]") -> Budget:
    return Budget(
        row.id,
        row.tenant_id,
        row.scope,
        row.subject,
        row.period,
        row.limit_nanos,
        bool(row.hard),
        tuple(int(pct) for pct in row.notify_pcts.split(",") if pct),
        row.webhook_url,
        row.created_at,
        row.retired_at,
    )


_IN_FORCE = (  # asked for each hold, so built once
    sa.select(budgets_table)
    .where(
        budgets_table.c.tenant_id.in_(sa.bindparam("tenants", expanding=True)),
        budgets_table.c.subject.in_(sa.bindparam("subjects", expanding=True)),
        budgets_table.c.retired_at.is_(None),
    )
    .order_by(budgets_table.c.id)
)


def in_force(connection: sa.Connection, tenants: set[str], subjects: set[str]) -> list[Budget]:
    """The budgets of `tenants` that bind requests of any of `subjects` now."""
    given = {"tenants": sorted(tenants), "subjects": sorted(subjects)}
    return [budget_of(row) for row in connection.execute(_IN_FORCE, given)]


def reserve(
    connection: sa.Connection, budgets: Sequence[Budget], amount_nanos: int, *, at: datetime
) -> list[Reservation]:
    """Take `amount_nanos` from all of `budgets` in the caller's transaction, or from none.

    Raises BudgetExceeded if a hard one has less left.
    """
    taken: list[tuple[Budget, Reservation]] = []
    for budget in budgets:
        place = (budget.id, budget.period_at(at))
        if not _take(connection, budget, place, amount_nanos):
            for _, earlier in taken:
                _move(connection, {earlier: (-amount_nanos, 0)})
            left = budget.limit_nanos - _used(connection, place)
            raise BudgetExceeded(budget.scope, budget.period, budget.limit_nanos, amount_nanos, max(left, 0))
        taken.append((budget, place))
    return [place for _, place in taken]


def release(connection: sa.Connection, closed: Iterable[tuple[Reservation, int, int]]) -> None:
    """Give back what was held, and charge what was spent: (reservation, held, spent) of each."""
    moves: dict[Reservation, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for place, held, spent in closed:
        moves[place] = (moves[place][0] - held, moves[place][1] + spent)
    _move(connection, moves)


def _take(connection: sa.Connection, budget: Budget, place: Reservation, amount_nanos: int) -> bool:
    row = {"budget_id": place[0], "period": place[1], "spent_nanos": 0, "held_nanos": 0, "notified_pct": 0}
    connection.execute(insert(connection, spend_table).on_conflict_do_nothing(), row)
    c = spend_table.c
    taking = spend_table.update().where(c.budget_id == place[0], c.period == place[1])
    if budget.hard:
        # The limit is read by the store itself: one that was lowered a moment ago binds already.
        limit = sa.select(budgets_table.c.limit_nanos).where(budgets_table.c.id == budget.id)
        taking = taking.where(c.spent_nanos + c.held_nanos + amount_nanos <= limit.scalar_subquery())
    return connection.execute(taking.values(held_nanos=c.held_nanos + amount_nanos)).rowcount == 1


def _move(connection: sa.Connection, moves: dict[Reservation, tuple[int, int]]) -> None:
    if not moves:
        return
    c = spend_table.c
    moving = (
        spend_table.update()
        .where(c.budget_id == sa.bindparam("b"), c.period == sa.bindparam("p"))
        .values(held_nanos=c.held_nanos + sa.bindparam("held"), spent_nanos=c.spent_nanos + sa.bindparam("s"))
    )
    rows = [{"b": b, "p": p, "held": held, "s": spent} for (b, p), (held, spent) in sorted(moves.items())]
    connection.execute(moving, rows)


def _used(connection: sa.Connection, place: Reservation) -> int:
    c = spend_table.c
    query = sa.select(c.spent_nanos + c.held_nanos).where(c.budget_id == place[0], c.period == place[1])
    return connection.execute(query).scalar() or 0
