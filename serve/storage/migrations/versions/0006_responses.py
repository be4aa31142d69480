"""Stored responses, and how much of the store each tenant's take."""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "responses",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("context", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_responses_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_responses"),
        sa.UniqueConstraint("request_id", name="uq_responses_request_id"),
    )
    op.create_index("ix_responses_tenant_id_created_at_id", "responses", ["tenant_id", "created_at", "id"])
    op.create_index("ix_responses_expires_at", "responses", ["expires_at"])
    op.create_table(
        "response_shelves",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("responses", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("responses >= 0", name=op.f("ck_response_shelves_responses_not_negative")),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_response_shelves_bytes_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_response_shelves_tenant_id"),
        sa.PrimaryKeyConstraint("tenant_id", name="pk_response_shelves"),
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
