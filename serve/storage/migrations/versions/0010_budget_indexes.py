"""Budgets are found by their subject, and what they spent by the period: neither reads what is past."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_budget_spend_period", "budget_spend", ["period"])
    op.drop_index("ix_budgets_tenant_id", "budgets")
    op.create_index("ix_budgets_tenant_id_subject", "budgets", ["tenant_id", "subject"])


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
