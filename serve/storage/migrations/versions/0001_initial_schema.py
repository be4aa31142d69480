"""Creates the first released schema. From here on a released schema is migrated, never replaced.

Rows of the ledger, of the audit log and of final invoices are only ever added: triggers of the store itself
refuse to change or delete them.
"""

import sqlalchemy as sa
from alembic import op

from serve.storage.database import UtcDateTime

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# SQLite numbers rows by itself (64 bits) only if the column's type is INTEGER. In PostgreSQL 2**31 rows are
# twelve days at 1,000 requests a second.
ENDLESS = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TRANSFER_KINDS = ("hold", "settle", "void", "grant", "withdraw", "expire", "charge", "refund", "payment")
BATCH_STATUSES = (
    *("validating", "failed", "in_progress", "finalizing"),
    *("completed", "expired", "cancelling", "cancelled"),
)
# table -> (condition by which an INSERT would replace a row, message)
APPEND_ONLY = {
    "audit_log": ("id = NEW.id", "the audit log is append-only"),
    "credit_notes": ("number = NEW.number", "credit_notes never change"),
    "final_invoices": ("number = NEW.number", "final_invoices never change"),
    "invoice_states": (
        "invoice_id = NEW.invoice_id AND position = NEW.position",
        "invoice_states never change",
    ),
    "invoices": ("id = NEW.id", "invoices never change"),
    "transfers": ("id = NEW.id", "transfers are append-only"),
    "usage_events": ("id = NEW.id", "usage_events are append-only"),
}


def upgrade() -> None:
    op.create_table(
        "audit_log",
        sa.Column("id", ENDLESS, nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("action", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.String(63)),
        sa.Column("subject", sa.String(160), nullable=False),
        sa.Column("details", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_log")),
    )
    op.create_index("ix_audit_log_tenant_id_id", "audit_log", ["tenant_id", "id"])
    op.create_table(
        "billing_details",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_billing_details")),
    )
    registry_revision = op.create_table(
        "registry_revision",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_registry_revision_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_registry_revision")),
    )
    op.create_table(
        "engine_totals",
        sa.Column("replica", sa.String(64), nullable=False),
        sa.Column("boot", sa.String(32), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("replica", "boot", name=op.f("pk_engine_totals")),
    )
    op.create_table(
        "invoice_numbers",
        sa.Column("series", sa.String(16), nullable=False),
        sa.Column("last", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("series", name=op.f("pk_invoice_numbers")),
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
        sa.PrimaryKeyConstraint("id", name=op.f("pk_limit_grants")),
    )
    op.create_index("ix_limit_grants_expires_at", "limit_grants", ["expires_at"])
    op.create_index(
        "ix_limit_grants_kind_subject_what_expires_at",
        "limit_grants",
        ["kind", "subject", "what", "expires_at"],
    )
    op.create_table(
        "limit_locks",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.PrimaryKeyConstraint("kind", "subject", name=op.f("pk_limit_locks")),
    )
    op.create_table(
        "limit_places",
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("subject", sa.String(63), nullable=False),
        sa.Column("gateway", sa.String(80), nullable=False),
        sa.Column("places", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.CheckConstraint("places >= 0", name=op.f("ck_limit_places_places_not_negative")),
        sa.PrimaryKeyConstraint("kind", "subject", "gateway", name=op.f("pk_limit_places")),
    )
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
        sa.PrimaryKeyConstraint("kind", "subject", name=op.f("pk_limits")),
    )
    op.create_table(
        "platform_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(16), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("revoked_at", UtcDateTime()),
        sa.Column("last_used_at", UtcDateTime()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_platform_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_platform_keys_digest")),
    )
    op.create_table(
        "price_plans",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_price_plans")),
        sa.UniqueConstraint("name", "sha256", name=op.f("uq_price_plans_name_sha256")),
        sa.UniqueConstraint("name", "version", name=op.f("uq_price_plans_name_version")),
    )
    op.create_table(
        "tenants",
        sa.Column("id", sa.String(63), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("suspended_at", UtcDateTime()),
        sa.Column("scopes", sa.String(255)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenants")),
    )
    op.create_table(
        "accounts",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("credit_nanos", sa.BigInteger(), nullable=False),
        sa.Column("spent_nanos", sa.BigInteger(), nullable=False),
        sa.Column("held_nanos", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("held_nanos >= 0", name=op.f("ck_accounts_held_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_accounts_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_accounts")),
    )
    op.create_table(
        "adapters",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("version", sa.String(16), nullable=False),
        sa.Column("base", sa.String(63), nullable=False),
        sa.Column("registered_at", UtcDateTime(), nullable=False),
        sa.Column("state", sa.String(8), server_default="pending", nullable=False),
        sa.Column("reason", sa.String(1000)),
        sa.Column("probed_at", UtcDateTime()),
        sa.Column("pinned", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.Column("retired_at", UtcDateTime()),
        sa.Column("rank", sa.Integer()),
        sa.Column("bytes", sa.BigInteger()),
        sa.CheckConstraint("state IN ('pending', 'ready', 'rejected')", name=op.f("ck_adapters_state_known")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_adapters_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("tenant_id", "name", "version", name=op.f("uq_adapters_tenant_id_name_version")),
    )
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
        sa.CheckConstraint("period IN ('day', 'month', 'total')", name=op.f("ck_budgets_period_known")),
        sa.CheckConstraint("scope IN ('tenant', 'project', 'key')", name=op.f("ck_budgets_scope_known")),
        sa.CheckConstraint("limit_nanos >= 0", name=op.f("ck_budgets_limit_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_budgets_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_budgets")),
    )
    op.create_index("ix_budgets_tenant_id_subject", "budgets", ["tenant_id", "subject"])
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
        sa.ForeignKeyConstraint(["plan_id"], ["price_plans.id"], name=op.f("fk_charges_plan_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_charges_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_charges")),
        sa.UniqueConstraint("reference", name=op.f("uq_charges_reference")),
    )
    op.create_index("ix_charges_tenant_id_created_at", "charges", ["tenant_id", "created_at"])
    op.create_index("ix_charges_tenant_id_period", "charges", ["tenant_id", "period"])
    op.create_table(
        "closed_periods",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("closed_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_closed_periods_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "period", name=op.f("pk_closed_periods")),
    )
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
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_credit_grants_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_credit_grants")),
    )
    op.create_index(op.f("ix_credit_grants_tenant_id"), "credit_grants", ["tenant_id"])
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
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_failed_attempts_tenant_id")),
        sa.PrimaryKeyConstraint("request_id", "attempt", name=op.f("pk_failed_attempts")),
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
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_files_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index("ix_files_tenant_id_created_at", "files", ["tenant_id", "created_at"])
    op.create_table(
        "uploads",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("purpose", sa.String(16), nullable=False),
        sa.Column("filename", sa.String(255), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(12), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.Column("file_expires_after_s", sa.Integer()),
        sa.Column("file_id", sa.String(40)),
        sa.CheckConstraint("bytes > 0", name=op.f("ck_uploads_bytes_positive")),
        sa.ForeignKeyConstraint(["file_id"], ["files.id"], name=op.f("fk_uploads_file_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_uploads_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_uploads")),
    )
    op.create_index(op.f("ix_uploads_expires_at"), "uploads", ["expires_at"])
    op.create_index("ix_uploads_tenant_id_status", "uploads", ["tenant_id", "status"])
    op.create_table(
        "upload_parts",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("upload_id", sa.String(40), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_upload_parts_bytes_not_negative")),
        sa.ForeignKeyConstraint(["upload_id"], ["uploads.id"], name=op.f("fk_upload_parts_upload_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_upload_parts")),
    )
    op.create_index(op.f("ix_upload_parts_upload_id"), "upload_parts", ["upload_id"])
    op.create_table(
        "idempotency_keys",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("body", sa.Text()),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_idempotency_keys_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", "digest", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_expires_at"), "idempotency_keys", ["expires_at"])
    op.create_index(op.f("ix_idempotency_keys_request_id"), "idempotency_keys", ["request_id"])
    op.create_table(
        "invoices",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("total_nanos", sa.BigInteger(), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_invoices_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invoices")),
        sa.UniqueConstraint(
            "tenant_id", "period", "revision", name=op.f("uq_invoices_tenant_id_period_revision")
        ),
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
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_notices_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_notices")),
    )
    op.create_index(op.f("ix_notices_next_try_at"), "notices", ["next_try_at"])
    op.create_table(
        "open_holds",
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("amount_nanos", sa.BigInteger(), nullable=False),
        sa.Column("budgets", sa.Text()),
        sa.Column("terms", sa.Text()),
        sa.Column("owner", sa.String(64)),
        sa.Column("lease_expires_at", UtcDateTime(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_open_holds_tenant_id")),
        sa.PrimaryKeyConstraint("request_id", name=op.f("pk_open_holds")),
    )
    op.create_index(op.f("ix_open_holds_lease_expires_at"), "open_holds", ["lease_expires_at"])
    op.create_table(
        "projects",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("archived_at", UtcDateTime()),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_projects_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_projects")),
        sa.UniqueConstraint("tenant_id", "name", name=op.f("uq_projects_tenant_id_name")),
    )
    op.create_table(
        "response_shelves",
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("responses", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("bytes >= 0", name=op.f("ck_response_shelves_bytes_not_negative")),
        sa.CheckConstraint("responses >= 0", name=op.f("ck_response_shelves_responses_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_response_shelves_tenant_id")),
        sa.PrimaryKeyConstraint("tenant_id", name=op.f("pk_response_shelves")),
    )
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
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_responses_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_responses")),
        sa.UniqueConstraint("request_id", name=op.f("uq_responses_request_id")),
    )
    op.create_index(op.f("ix_responses_expires_at"), "responses", ["expires_at"])
    op.create_index("ix_responses_tenant_id_created_at_id", "responses", ["tenant_id", "created_at", "id"])
    op.create_table(
        "subscriptions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("plan_id", sa.Integer(), nullable=True),
        sa.Column("effective_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["plan_id"], ["price_plans.id"], name=op.f("fk_subscriptions_plan_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_subscriptions_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_subscriptions")),
    )
    op.create_index("ix_subscriptions_tenant_id_effective_at", "subscriptions", ["tenant_id", "effective_at"])
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
        sa.CheckConstraint(
            f"kind IN {TRANSFER_KINDS}",
            name=op.f("ck_transfers_kind_known"),
        ),
        sa.CheckConstraint("amount_nanos >= 0", name=op.f("ck_transfers_amount_not_negative")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_transfers_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_transfers")),
        sa.UniqueConstraint("request_id", "phase", name=op.f("uq_transfers_request_id_phase")),
    )
    op.create_index("ix_transfers_tenant_id_kind", "transfers", ["tenant_id", "kind"])
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
        sa.Column("requests", sa.BigInteger(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cold_loads", sa.BigInteger(), nullable=False),
        sa.Column("cost_nanos", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_hours_tenant_id")),
        sa.PrimaryKeyConstraint(
            "tenant_id",
            "hour",
            "period",
            "project",
            "key_id",
            "model",
            "adapter",
            "plan_id",
            "tier",
            name=op.f("pk_usage_hours"),
        ),
        sqlite_with_rowid=False,
    )
    op.create_index("ix_usage_hours_hour", "usage_hours", ["hour"])
    op.create_index("ix_usage_hours_tenant_id_period", "usage_hours", ["tenant_id", "period"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("hint", sa.String(16), nullable=False),
        sa.Column("scopes", sa.String(255), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("revoked_at", UtcDateTime()),
        sa.Column("project_id", sa.String(32)),
        sa.Column("name", sa.String(100)),
        sa.Column("expires_at", UtcDateTime()),
        sa.Column("last_used_at", UtcDateTime()),
        sa.Column("successor_id", sa.String(32)),
        sa.ForeignKeyConstraint(["project_id"], ["projects.id"], name=op.f("fk_api_keys_project_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_api_keys_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_keys_digest")),
    )
    op.create_index(op.f("ix_api_keys_tenant_id"), "api_keys", ["tenant_id"])
    op.create_table(
        "budget_spend",
        sa.Column("budget_id", sa.String(32), nullable=False),
        sa.Column("period", sa.String(10), nullable=False),
        sa.Column("spent_nanos", sa.BigInteger(), nullable=False),
        sa.Column("held_nanos", sa.BigInteger(), nullable=False),
        sa.Column("notified_pct", sa.Integer(), nullable=False),
        sa.CheckConstraint("held_nanos >= 0", name=op.f("ck_budget_spend_held_not_negative")),
        sa.ForeignKeyConstraint(["budget_id"], ["budgets.id"], name=op.f("fk_budget_spend_budget_id")),
        sa.PrimaryKeyConstraint("budget_id", "period", name=op.f("pk_budget_spend")),
    )
    op.create_index("ix_budget_spend_period", "budget_spend", ["period"])
    op.create_table(
        "final_invoices",
        sa.Column("number", sa.String(24), nullable=False),
        sa.Column("invoice_id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("period", sa.String(7), nullable=False),
        sa.Column("document", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("issued_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoices.id"], name=op.f("fk_final_invoices_invoice_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_final_invoices_tenant_id")),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_final_invoices")),
        sa.UniqueConstraint("invoice_id", name=op.f("uq_final_invoices_invoice_id")),
    )
    op.create_index("ix_final_invoices_tenant_id_period", "final_invoices", ["tenant_id", "period"])
    op.create_table(
        "invoice_states",
        sa.Column("invoice_id", sa.Integer(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("reason", sa.String(200), nullable=False),
        sa.Column("at", UtcDateTime(), nullable=False),
        sa.CheckConstraint(
            "state IN ('draft', 'review', 'finalized', 'paid', 'void')",
            name=op.f("ck_invoice_states_state_known"),
        ),
        sa.ForeignKeyConstraint(["invoice_id"], ["invoices.id"], name=op.f("fk_invoice_states_invoice_id")),
        sa.PrimaryKeyConstraint("invoice_id", "position", name=op.f("pk_invoice_states")),
    )
    op.create_table(
        "promotions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("adapter_id", sa.Integer(), nullable=False),
        sa.Column("promoted_at", UtcDateTime(), nullable=False),
        sa.ForeignKeyConstraint(["adapter_id"], ["adapters.id"], name=op.f("fk_promotions_adapter_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_promotions")),
    )
    op.create_index(op.f("ix_promotions_adapter_id"), "promotions", ["adapter_id"])
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
        sa.Column("in_progress_at", UtcDateTime()),
        sa.Column("finalizing_at", UtcDateTime()),
        sa.Column("completed_at", UtcDateTime()),
        sa.Column("failed_at", UtcDateTime()),
        sa.Column("expired_at", UtcDateTime()),
        sa.Column("cancelling_at", UtcDateTime()),
        sa.Column("cancelled_at", UtcDateTime()),
        sa.Column("lease_owner", sa.String(64)),
        sa.Column("lease_expires_at", UtcDateTime()),
        sa.CheckConstraint(
            f"status IN {BATCH_STATUSES}",
            name=op.f("ck_batches_status_known"),
        ),
        sa.ForeignKeyConstraint(["error_file_id"], ["files.id"], name=op.f("fk_batches_error_file_id")),
        sa.ForeignKeyConstraint(["input_file_id"], ["files.id"], name=op.f("fk_batches_input_file_id")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_batches_key_id")),
        sa.ForeignKeyConstraint(["output_file_id"], ["files.id"], name=op.f("fk_batches_output_file_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_batches_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batches")),
    )
    op.create_index(op.f("ix_batches_status"), "batches", ["status"])
    op.create_index("ix_batches_tenant_id_created_at", "batches", ["tenant_id", "created_at"])
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
            ["invoice_number"], ["final_invoices.number"], name=op.f("fk_credit_notes_invoice_number")
        ),
        sa.PrimaryKeyConstraint("number", name=op.f("pk_credit_notes")),
    )
    op.create_index(op.f("ix_credit_notes_invoice_number"), "credit_notes", ["invoice_number"])
    op.create_table(
        "usage_events",
        sa.Column("id", ENDLESS, nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("tenant_id", sa.String(63), nullable=False),
        sa.Column("key_id", sa.String(32), nullable=False),
        sa.Column("model", sa.String(160), nullable=False),
        sa.Column("base", sa.String(63), nullable=False),
        sa.Column("adapter_version", sa.String(160)),
        sa.Column("plan_id", sa.Integer(), nullable=False),
        sa.Column("replica", sa.String(64), nullable=False),
        sa.Column("boot", sa.String(32), nullable=False),
        sa.Column("samples", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("cached_tokens", sa.Integer(), nullable=False),
        sa.Column("completion_tokens", sa.Integer(), nullable=False),
        sa.Column("cost_nanos", sa.BigInteger(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("finish_reason", sa.String(32)),
        sa.Column("ttft_ms", sa.Integer(), nullable=False),
        sa.Column("latency_ms", sa.Integer(), nullable=False),
        sa.Column("created_at", UtcDateTime(), nullable=False),
        sa.Column("tier", sa.String(8), server_default="default", nullable=False),
        sa.Column("project", sa.String(63)),
        sa.Column("attempt", sa.SmallInteger(), server_default="1", nullable=False),
        sa.Column("cold_loads", sa.SmallInteger(), server_default="0", nullable=False),
        sa.Column("period", sa.String(7), server_default="", nullable=False),
        sa.CheckConstraint("tier IN ('default', 'batch')", name=op.f("ck_usage_events_tier_known")),
        sa.CheckConstraint("cached_tokens <= prompt_tokens", name=op.f("ck_usage_events_cached_in_prompt")),
        sa.CheckConstraint("cost_nanos >= 0", name=op.f("ck_usage_events_cost_not_negative")),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_usage_events_key_id")),
        sa.ForeignKeyConstraint(["plan_id"], ["price_plans.id"], name=op.f("fk_usage_events_plan_id")),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"], name=op.f("fk_usage_events_tenant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_events")),
        sa.UniqueConstraint("request_id", name=op.f("uq_usage_events_request_id")),
    )
    op.create_index("ix_usage_events_tenant_id_created_at", "usage_events", ["tenant_id", "created_at"])
    op.create_index("ix_usage_events_tenant_id_period", "usage_events", ["tenant_id", "period", "created_at"])
    op.create_table(
        "batch_results",
        sa.Column("batch_id", sa.String(40), nullable=False),
        sa.Column("line", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("custom_id", sa.String(512), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("status_code", sa.SmallInteger()),
        sa.Column("body", sa.Text()),
        sa.ForeignKeyConstraint(["batch_id"], ["batches.id"], name=op.f("fk_batch_results_batch_id")),
        sa.PrimaryKeyConstraint("batch_id", "line", name=op.f("pk_batch_results")),
        sa.UniqueConstraint("request_id", name=op.f("uq_batch_results_request_id")),
    )
    op.create_table(
        "quarantined_requests",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("deaths", sa.SmallInteger(), nullable=False),
        sa.Column("boot", sa.String(32)),
        sa.Column("expires_at", UtcDateTime(), nullable=False),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_quarantined_requests")),
    )
    op.create_index("ix_quarantined_requests_expires_at", "quarantined_requests", ["expires_at"])
    op.bulk_insert(registry_revision, [{"id": 1, "revision": 0}])
    for table, (same_row, message) in APPEND_ONLY.items():
        if op.get_context().dialect.name == "sqlite":
            _refuse_changes_in_sqlite(table, same_row, message)
        else:
            _refuse_changes_in_postgresql(table, message)


def _refuse_changes_in_sqlite(table: str, same_row: str, message: str) -> None:
    """Adds three triggers: "INSERT OR REPLACE" deletes without firing the DELETE trigger, hence the third."""
    abort = f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
    op.execute(f"CREATE TRIGGER {table}_keeps_updates BEFORE UPDATE ON {table} {abort}")
    op.execute(f"CREATE TRIGGER {table}_keeps_deletes BEFORE DELETE ON {table} {abort}")
    op.execute(
        f"CREATE TRIGGER {table}_keeps_replaces BEFORE INSERT ON {table} "
        f"WHEN EXISTS (SELECT 1 FROM {table} WHERE {same_row}) {abort}"
    )


def _refuse_changes_in_postgresql(table: str, message: str) -> None:
    op.execute(
        f"CREATE FUNCTION {table}_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        f"$$ BEGIN RAISE EXCEPTION '{message}' USING ERRCODE = 'restrict_violation'; END $$"
    )
    op.execute(
        f"CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
        f"FOR EACH STATEMENT EXECUTE FUNCTION {table}_append_only()"
    )


def downgrade() -> None:
    raise NotImplementedError("the ledger is append-only; restore a backup instead")
