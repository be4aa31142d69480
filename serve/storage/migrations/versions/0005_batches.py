"""The tier of a usage event; files, batches and the results of their lines."""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

STATUSES = (
    "validating",
    "failed",
    "in_progress",
    "finalizing",
    "completed",
    "expired",
    "cancelling",
    "cancelled",
)


def upgrade() -> None:
    # In SQL, because SQLite takes a constraint only with its column (see 0002).
    op.execute(
        "ALTER TABLE usage_events ADD COLUMN tier VARCHAR(8) DEFAULT 'default' NOT NULL "
        "CONSTRAINT ck_usage_events_tier_known CHECK (tier IN ('default', 'batch'))"
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("deleted_at", UtcDateTime()),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_files_bytes_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_files_tenant_id"),
        sa.PrimaryKeyConstraint("id", name="pk_files"),
    )
    op.create_index("ix_files_tenant_id_created_at", "files", ["tenant_id", "created_at"])
    op.create_table(
        "batches",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("endpoint", sa.String(32), nullable=False),
        sa.Column("input_file_id", sa.String(40), nullable=False),
        sa.Column("completion_window", sa.String(8), nullable=False),
        sa.Column("metadata", sa.Text()),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("errors", sa.Text()),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.Column("output_file_id", sa.String(40)),
        sa.Column("error_file_id", sa.String(40)),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        *(
            sa.Column(f"{status}_at", UtcDateTime())
            for status in ("in_progress", "finalizing", "completed", "failed", "expired")
        ),
        sa.Column("cancelling_at", UtcDateTime()),
        sa.Column("cancelled_at", UtcDateTime()),
        sa.Column("lease_owner", sa.String(64)),
        sa.Column("lease_expires_at", UtcDateTime()),
        sa.CheckConstraint(f"status IN {STATUSES}", name=op.f("ck_batches_status_known")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_batches_tenant_id"),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name="fk_batches_key_id"),
        sa.ForeignKeyConstraint(["input_file_id"], ["files.id"], name="fk_batches_input_file_id"),
        sa.ForeignKeyConstraint(["output_file_id"], ["files.id"], name="fk_batches_output_file_id"),
        sa.ForeignKeyConstraint(["error_file_id"], ["files.id"], name="fk_batches_error_file_id"),
        sa.PrimaryKeyConstraint("id", name="pk_batches"),
    )
    op.create_index("ix_batches_tenant_id_created_at", "batches", ["tenant_id", "created_at"])
    op.create_index("ix_batches_status", "batches", ["status"])
    op.create_table(
        "batch_results",
        sa.Column("batch_id", sa.String(40), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("status_code", sa.SmallInteger()),
        sa.Column("body", sa.Text()),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name="fk_batch_results_batch_id"),
        sa.PrimaryKeyConstraint("batch_id", "line", name="pk_batch_results"),
        sa.UniqueConstraint("request_id", name="uq_batch_results_request_id"),
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
