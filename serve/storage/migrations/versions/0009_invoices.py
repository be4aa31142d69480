"""Invoices that become final: their states, numbers, final documents, credit notes; who is billed by whom.

What is final is kept by the store itself: triggers refuse to change or delete it.
"""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

STATES = ("draft", "review", "finalized", "paid", "void")
APPEND_ONLY = ("invoices", "invoice_states", "final_invoices", "credit_notes")


def upgrade() -> None:
    op.create_table(
        "invoice_states",
        sa.Column("invoice_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.CheckConstraint(f"state IN {STATES}", name=op.f("ck_invoice_states_state_known")),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoices.id"], name="fk_invoice_states_invoice_id"),
        sa.PrimaryKeyConstraint("invoice_id", "position", name="pk_invoice_states"),
    )
    op.execute(
        "INSERT INTO invoice_states (invoice_id, position, state, actor, reason, at) "
        "SELECT id, 1, 'draft', 'system', 'before 0009', created_at FROM invoices"
    )
    op.create_table(
        "invoice_numbers",
        sa.Column("series", sa.String(16), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("series", name="pk_invoice_numbers"),
    )
    op.create_table(
        "final_invoices",
        sa.Column("number", sa.String(24), nullable=False),
        sa.Column("invoice_id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("issued_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoices.id"], name="fk_final_invoices_invoice_id"),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name="fk_final_invoices_tenant_id"),
        sa.PrimaryKeyConstraint("number", name="pk_final_invoices"),
        sa.UniqueConstraint("invoice_id", name="uq_final_invoices_invoice_id"),
    )
    op.create_index("ix_final_invoices_tenant_id_period", "final_invoices", ["tenant_id", "period"])
    op.create_table(
        "credit_notes",
        sa.Column("number", sa.String(24), nullable=False),
        sa.Column("invoice_number", sa.String(24), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("issued_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("amount_nanos > 0", name=op.f("ck_credit_notes_amount_positive")),
        sa.ForeignKeyConstraint(
            ["invoice_number"], ["final_invoices.number"], name="fk_credit_notes_invoice_number"
        ),
        sa.PrimaryKeyConstraint("number", name="pk_credit_notes"),
    )
    op.create_index("ix_credit_notes_invoice_number", "credit_notes", ["invoice_number"])
    op.create_table(
        "billing_parties",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_billing_parties"),
    )
    sqlite = op.get_context().dialect.name == "sqlite"
    for table in APPEND_ONLY:
        _keep(table, sqlite)


def _keep(table: str, sqlite: bool) -> None:
    """No row of `table` is ever changed or deleted. "INSERT OR REPLACE" fires no DELETE trigger."""
    said = f"{table} never change"
    if sqlite:
        for event in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER {table}_keeps_{event.lower()}s BEFORE {event} ON {table} "
                f"BEGIN SELECT RAISE(ABORT, '{said}'); END"
            )
        key = {
            "invoices": "id = NEW.id",
            "invoice_states": "invoice_id = NEW.invoice_id AND position = NEW.position",
        }.get(table, "number = NEW.number")
        op.execute(
            f"CREATE TRIGGER {table}_keeps_replaces BEFORE INSERT ON {table} "
            f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {key}) BEGIN SELECT RAISE(ABORT, '{said}'); END"
        )
        return
    op.execute(
        f"CREATE FUNCTION {table}_never_change() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{said}' USING ERRCODE = 'restrict_violation'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_never_change BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_never_change()"
    )


def downgrade() -> None:
    raise NotImplementedError("invoices are kept; restore a backup instead")
