"""Limits, and what the gateways have leased of them."""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "limits",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("requests_per_min", sa.BigInteger()),
        sa.Column("tokens_per_min", sa.BigInteger()),
        sa.Column("concurrent_requests", sa.BigInteger()),
        sa.Column("context_tokens", sa.BigInteger()),
        sa.Column("models", sa.Text()),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("kind IN ('tenant', 'key')", name=op.f("ck_limits_kind_known")),
        sa.PrimaryKeyConstraint("kind", "subject", name="pk_limits"),
    )
    op.create_table(
        "limit_locks",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("kind", "subject", name="pk_limit_locks"),
    )
    op.create_table(
        "limit_grants",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("what", sa.String(8), nullable=False),
        sa.Column("units", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.CheckConstraint("units >= 0", name=op.f("ck_limit_grants_units_not_negative")),
        sa.PrimaryKeyConstraint("id", name="pk_limit_grants"),
    )
    op.create_index(
        "ix_limit_grants_kind_subject_what_expires_at",
        "limit_grants",
        ["kind", "subject", "what", "expires_at"],
    )
    op.create_index("ix_limit_grants_expires_at", "limit_grants", ["expires_at"])
    op.create_table(
        "limit_places",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("gateway", sa.String(80), nullable=False),
        sa.Column("places", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.CheckConstraint("places >= 0", name=op.f("ck_limit_places_places_not_negative")),
        sa.PrimaryKeyConstraint("kind", "subject", "gateway", name="pk_limit_places"),
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
