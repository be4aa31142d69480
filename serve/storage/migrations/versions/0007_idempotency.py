"""Answers kept for retries."""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("body", sa.Text()),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_idempotency_keys_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name="pk_idempotency_keys"),
    )
    op.create_index("ix_idempotency_keys_request_id", "idempotency_keys", ["request_id"])
    op.create_index("ix_idempotency_keys_expires_at", "idempotency_keys", ["expires_at"])


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
