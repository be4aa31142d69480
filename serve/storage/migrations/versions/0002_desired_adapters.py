"""What is known and wanted of each adapter version; the number that tells replicas to look again."""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # In SQL, because SQLite takes a constraint only with its column, and alembic would copy the whole table,
    # which promotions refer to.
    op.execute(
        "ALTER TABLE adapters ADD COLUMN state VARCHAR(8) DEFAULT 'pending' NOT NULL "
        "CONSTRAINT ck_adapters_state_known CHECK (state IN ('pending', 'ready', 'rejected'))"
    )
    for column in (
        sa.Column("reason", sa.String(1000)),
        sa.Column("probed_at", UtcDateTime()),
        sa.Column("pinned", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("retired_at", UtcDateTime()),
        sa.Column("rank", sa.Integer()),
        sa.Column("bytes", sa.BigInteger()),
    ):
        op.add_column("adapters", column)
    counter = op.create_table(
        "catalogue_revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_catalogue_revision_one_row")),
        sa.PrimaryKeyConstraint("id", name="pk_catalogue_revision"),
    )
    op.bulk_insert(counter, [{"id": 1, "revision": 0}])


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
