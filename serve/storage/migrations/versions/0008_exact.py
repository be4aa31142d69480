"""Double entry, open holds, budgets, usage by the hour and by engine, periods, charges, grants, notices.

Transfers and usage events become append-only in the store itself.
"""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

APPEND_ONLY = ("transfers", "usage_events")
# SQLite numbers rows by itself (64 bits) only if the column's type is INTEGER.
ENDLESS = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
KINDS = ("hold", "settle", "void", "grant", "withdraw", "expire", "charge", "refund", "payment")


def upgrade() -> None:
    sqlite = op.get_context().dialect.name == "sqlite"
    _open_holds(sqlite)
    _transfers(sqlite)
    _usage(sqlite)
    _budgets()
    _rest()
    if not sqlite:  # 2³¹ rows are twelve days at 1,000 requests a second
        for table in ("usage_events", "audit_log"):
            op.alter_column(table, "id", type_=sa.BigInteger())
    for table in APPEND_ONLY:
        _keep(table, sqlite)


def _open_holds(sqlite: bool) -> None:
    op.create_table(
        "open_holds",
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("budgets", sa.Text()),
        sa.Column("sale", sa.Text()),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_expires_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_open_holds_tenant_id"),
        sa.PrimaryKeyConstraint("request_id", name="pk_open_holds"),
    )
    op.create_index("ix_open_holds_lease_expires_at", "open_holds", ["lease_expires_at"])
    op.execute(
        "INSERT INTO open_holds (request_id, tenant_id, amount_nanos, lease_expires_at, created_at) "
        "SELECT request_id, tenant_id, amount_nanos, lease_expires_at, created_at FROM transfers "
        "WHERE phase = 1 AND request_id NOT IN (SELECT request_id FROM transfers WHERE phase = 2)"
    )


def _transfers(sqlite: bool) -> None:
    """A table that is new: SQLite cannot widen a check. Each account's credit becomes the transfer it was."""
    op.drop_index("ix_transfers_kind_lease_expires_at", "transfers")
    op.rename_table("transfers", "transfers_before")
    if not sqlite:  # there names of constraints and sequences outlive their table's name
        op.execute("ALTER TABLE transfers_before DROP CONSTRAINT pk_transfers")
        op.execute("ALTER TABLE transfers_before DROP CONSTRAINT uq_transfers_request_id_phase")
        op.execute("ALTER SEQUENCE transfers_id_seq RENAME TO transfers_before_id_seq")
    op.create_table(
        "transfers",
        sa.Column("id", ENDLESS, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("phase", sa.SmallInteger(), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("debit", sa.String(63), nullable=False),
        sa.Column("credit", sa.String(63), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(64)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("amount_nanos >= 0", name=op.f("ck_transfers_amount_not_negative")),
        sa.CheckConstraint(f"kind IN {KINDS}", name=op.f("ck_transfers_kind_known")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_transfers_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_transfers"),
        sa.UniqueConstraint("request_id", "phase", name="uq_transfers_request_id_phase"),
    )
    op.create_index("ix_transfers_tenant_id_kind", "transfers", ["tenant_id", "kind"])
    names = "request_id, phase, kind, tenant_id, amount_nanos, reason, created_at"
    op.execute(
        f"INSERT INTO transfers ({names}, debit, credit) "
        f"SELECT {names}, tenant_id, 'revenue' FROM transfers_before ORDER BY id"
    )
    op.execute(
        f"INSERT INTO transfers ({names}, debit, credit) "
        "SELECT '=' || tenant_id, 2, 'grant', tenant_id, credit_nanos, 'credit before 0008', "
        "CURRENT_TIMESTAMP, 'platform', tenant_id FROM accounts"
    )
    op.drop_table("transfers_before")


def _usage(sqlite: bool) -> None:
    for column in (
        sa.Column("project", sa.String(63)),
        sa.Column("attempt", sa.SmallInteger(), nullable=False, server_default="1"),
        sa.Column("cold_loads", sa.SmallInteger(), nullable=False, server_default="0"),
        sa.Column("period", sa.String(7), nullable=False, server_default=""),
    ):
        op.add_column("usage_events", column)
    month = "substr(created_at, 1, 7)" if sqlite else "to_char(created_at AT TIME ZONE 'UTC', 'YYYY-MM')"
    op.execute(f"UPDATE usage_events SET period = {month}")
    op.create_index("ix_usage_events_tenant_id_period", "usage_events", ["tenant_id", "period", "created_at"])
    op.create_table(
        "failed_attempts",
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("attempt", sa.SmallInteger(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("model", sa.String(160), nullable=False),
        sa.Column("replica", sa.String(64)),
        sa.Column("boot", sa.String(32)),
        sa.Column("error", sa.String(64), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_failed_attempts_tenant_id"),
        sa.PrimaryKeyConstraint("request_id", "attempt", name="pk_failed_attempts"),
    )
    sums = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "cold_loads", "cost_nanos")
    keys = ("tenant_id", "hour", "period", "project", "key_id", "model", "adapter", "plan_id", "tier")
    op.create_table(
        "usage_hours",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("hour", UtcDateTime(), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("project", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String(160), nullable=False),
        sa.Column("adapter", sa.Boolean(), nullable=False),
        sa.Column("plan_id", sa.Integer(), nullable=False),
        sa.Column("tier", sa.String(8), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in sums),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_usage_hours_tenant_id"),
        sa.PrimaryKeyConstraint(*keys, name="pk_usage_hours"),
        sqlite_with_rowid=False,  # rows in the order of their key: a tenant's month is read in one go
    )
    op.create_index("ix_usage_hours_hour", "usage_hours", ["hour"])
    op.create_index("ix_usage_hours_tenant_id_period", "usage_hours", ["tenant_id", "period"])
    hour = (
        "strftime('%Y-%m-%d %H:00:00.000000', created_at)"
        if sqlite
        else "date_trunc('hour', created_at, 'UTC')"
    )
    grouped = (
        f"tenant_id, {hour}, period, coalesce(project, ''), key_id, model, adapter_version IS NOT NULL, "
        "plan_id, tier"
    )
    op.execute(
        f"INSERT INTO usage_hours ({', '.join(keys + sums)}) SELECT {grouped}, count(*), sum(prompt_tokens), "
        "sum(cached_tokens), sum(completion_tokens), sum(cold_loads), sum(cost_nanos) FROM usage_events "
        "GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9"
    )
    op.create_table(
        "engine_totals",
        sa.Column("replica", sa.String(64), nullable=False),
        sa.Column("boot", sa.String(32), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("replica", "boot", name="pk_engine_totals"),
    )
    op.execute(
        "INSERT INTO engine_totals SELECT replica, boot, sum(prompt_tokens * samples), "
        "sum(completion_tokens), max(created_at) FROM usage_events GROUP BY replica, boot"
    )
    op.create_table(
        "closed_periods",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("closed_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_closed_periods_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", "period", name="pk_closed_periods"),
    )


def _budgets() -> None:
    op.create_table(
        "budgets",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("scope", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("limit_nanos", sa.BigInteger(), nullable=False),
        sa.Column("hard", sa.Boolean(), nullable=False),
        sa.Column("notify_pcts", sa.String(64), nullable=False),
        sa.Column("webhook_url", sa.String(512)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("retired_at", UtcDateTime()),
        sa.CheckConstraint("limit_nanos >= 0", name=op.f("ck_budgets_limit_not_negative")),
        sa.CheckConstraint("scope IN ('tenant', 'project', 'key')", name=op.f("ck_budgets_scope_known")),
        sa.CheckConstraint("period IN ('day', 'month', 'total')", name=op.f("ck_budgets_period_known")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_budgets_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_budgets"),
    )
    op.create_index("ix_budgets_tenant_id", "budgets", ["tenant_id"])
    op.create_table(
        "budget_spend",
        sa.Column("budget_id", sa.String(32), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
        sa.Column("spent_nanos", sa.BigInteger(), nullable=False),
        sa.Column("held_nanos", sa.BigInteger(), nullable=False),
        sa.Column("notified_pct", sa.Integer(), nullable=False),
        sa.CheckConstraint("held_nanos >= 0", name=op.f("ck_budget_spend_held_not_negative")),
        sa.ForeignKeyConstraint(["budget_id"], ["budgets.id"], name="fk_budget_spend_budget_id"),
        sa.PrimaryKeyConstraint("budget_id", "period", name="pk_budget_spend"),
    )
    op.create_table(
        "notices",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("url", sa.String(512), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_try_at", UtcDateTime()),
        sa.Column("delivered_at", UtcDateTime()),
        sa.Column("last_error", sa.String(200)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_notices_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_notices"),
    )
    op.create_index("ix_notices_next_try_at", "notices", ["next_try_at"])


def _rest() -> None:
    op.create_table(
        "charges",
        sa.Column("id", ENDLESS, nullable=False),
        sa.Column("reference", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(160), nullable=False),
        sa.Column("quantity", sa.BigInteger(), nullable=False),
        sa.Column("plan_id", sa.Integer(), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("kind IN ('training', 'residency')", name=op.f("ck_charges_kind_known")),
        sa.CheckConstraint("amount_nanos >= 0", name=op.f("ck_charges_amount_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_charges_tenant_id"),
        sa.ForeignKeyConstraint(["plan_id"], ["price_plans.id"], name="fk_charges_plan_id"),
        sa.PrimaryKeyConstraint("id", name="pk_charges"),
        sa.UniqueConstraint("reference", name="uq_charges_reference"),
    )
    op.create_index("ix_charges_tenant_id_period", "charges", ["tenant_id", "period"])
    op.create_table(
        "credit_grants",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.String(100)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("expired_nanos", sa.BigInteger()),
        sa.CheckConstraint(
            "kind IN ('prepaid', 'promotional', 'line')", name=op.f("ck_credit_grants_kind_known")
        ),
        sa.CheckConstraint("amount_nanos > 0", name=op.f("ck_credit_grants_amount_positive")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_credit_grants_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_credit_grants"),
    )
    op.create_index("ix_credit_grants_tenant_id", "credit_grants", ["tenant_id"])


def _keep(table: str, sqlite: bool) -> None:
    """No row of `table` is ever changed or deleted. "INSERT OR REPLACE" fires no DELETE trigger."""
    said = f"{table} are append-only"
    if sqlite:
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_keeps_{event.lower()}s BEFORE {event} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{said}'); END"
            )
        op.execute(
            f"CREATE TRIGGER {table}_keeps_replaces BEFORE INSERT ON {table} "
            f"WHEN NEW.id IS NOT NULL AND EXISTS (SELECT 1 FROM {table} WHERE id = NEW.id) "
            f"BEGIN SELECT RAISE(ABORT, '{said}'); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{said}' USING ERRCODE = 'restrict_violation'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_append_only()"
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
