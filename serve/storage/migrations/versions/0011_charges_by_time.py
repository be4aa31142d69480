"""Charges are found by their time too: those of three days, every hour, among years of adapter-hours."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_charges_tenant_id_created_at", "charges", ["tenant_id", "created_at"])


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
