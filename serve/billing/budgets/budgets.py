"""Budgets limit what a tenant, project or key may spend in a day, in a month, or in total.

A hard budget is a conditional UPDATE in the hold's transaction, so it is never exceeded, across all
gateways. A soft budget is only counted, and alerts at its thresholds. A hold stores the budgets that it
reserved from, so it releases exactly those, even if budgets changed meanwhile.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from serve.billing.pricing.currencies import currency_of
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
    """Limits the spending of one subject: the tenant's name, or a project's or key's id, by `scope`."""

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
        """Return the name of the period, in UTC, that contains `at`: 2026-11-24, 2026-11 or total."""
        return at.astimezone(UTC).strftime(PERIODS[self.period])

    def reached_pct(self, spent_nanos: int) -> int:
        """Return the highest threshold that `spent_nanos` reaches; 0 if none."""
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


_IN_FORCE = (  # built once, because each hold runs it
    sa.select(budgets_table)
    .where(
        budgets_table.c.tenant_id.in_(sa.bindparam("tenants", expanding=True)),
        budgets_table.c.subject.in_(sa.bindparam("subjects", expanding=True)),
        budgets_table.c.retired_at.is_(None),
    )
    .order_by(budgets_table.c.id)
)


def in_force(connection: sa.Connection, tenants: set[str], subjects: set[str]) -> list[Budget]:
    """Return the budgets of `tenants` in force for requests of any of `subjects`."""
    parameters = {"tenants": sorted(tenants), "subjects": sorted(subjects)}
    return [budget_of(row) for row in connection.execute(_IN_FORCE, parameters)]


def reserve(
    connection: sa.Connection, budgets: Sequence[Budget], amount_nanos: int, *, at: datetime
) -> list[Reservation]:
    """Reserve `amount_nanos` from all of `budgets` in the caller's transaction, or from none.

    Raises BudgetExceeded if a hard budget has less left.
    """
    reserved: list[tuple[Budget, Reservation]] = []
    for budget in budgets:
        reservation = (budget.id, budget.period_at(at))
        if not _reserve_one(connection, budget, reservation, amount_nanos):
            for _, earlier in reserved:
                _add(connection, {earlier: (-amount_nanos, 0)})
            left_nanos = budget.limit_nanos - _used_nanos(connection, reservation)
            raise BudgetExceeded(
                budget.scope,
                budget.period,
                budget.limit_nanos,
                amount_nanos,
                max(left_nanos, 0),
                currency_of(connection, budget.tenant),
            )
        reserved.append((budget, reservation))
    return [reservation for _, reservation in reserved]


def release(connection: sa.Connection, closed: Iterable[tuple[Reservation, int, int]]) -> None:
    """Release what was held and add what was spent: (reservation, held, spent) of each."""
    changes: dict[Reservation, tuple[int, int]] = defaultdict(lambda: (0, 0))
    for reservation, held, spent in closed:
        changes[reservation] = (changes[reservation][0] - held, changes[reservation][1] + spent)
    _add(connection, changes)


def _reserve_one(
    connection: sa.Connection, budget: Budget, reservation: Reservation, amount_nanos: int
) -> bool:
    row = {
        "budget_id": reservation[0],
        "period": reservation[1],
        "spent_nanos": 0,
        "held_nanos": 0,
        "notified_pct": 0,
    }
    connection.execute(insert(connection, spend_table).on_conflict_do_nothing(), row)
    c = spend_table.c
    update = spend_table.update().where(c.budget_id == reservation[0], c.period == reservation[1])
    if budget.hard:
        # The UPDATE reads the limit itself, so a limit that was just lowered already applies.
        limit = sa.select(budgets_table.c.limit_nanos).where(budgets_table.c.id == budget.id)
        update = update.where(c.spent_nanos + c.held_nanos + amount_nanos <= limit.scalar_subquery())
    return connection.execute(update.values(held_nanos=c.held_nanos + amount_nanos)).rowcount == 1


def _add(connection: sa.Connection, changes: dict[Reservation, tuple[int, int]]) -> None:
    if not changes:
        return
    c = spend_table.c
    update = (
        spend_table.update()
        .where(c.budget_id == sa.bindparam("b"), c.period == sa.bindparam("p"))
        .values(held_nanos=c.held_nanos + sa.bindparam("held"), spent_nanos=c.spent_nanos + sa.bindparam("s"))
    )
    rows = [{"b": b, "p": p, "held": held, "s": spent} for (b, p), (held, spent) in sorted(changes.items())]
    connection.execute(update, rows)


def _used_nanos(connection: sa.Connection, reservation: Reservation) -> int:
    c = spend_table.c
    query = sa.select(c.spent_nanos + c.held_nanos).where(
        c.budget_id == reservation[0], c.period == reservation[1]
    )
    return connection.execute(query).scalar() or 0
