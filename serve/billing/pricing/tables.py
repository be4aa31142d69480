"""Stores plans' versions and the tenants' subscriptions to them. Rows are only added."""

import sqlalchemy as sa

from serve.storage.database import UtcDateTime, metadata

plans_table = sa.Table(
    "price_plans",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("document", sa.Text, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.UniqueConstraint("name", "version"),
    sa.UniqueConstraint("name", "sha256"),
)

subscriptions_table = sa.Table(
    "subscriptions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("plan_id", sa.ForeignKey("price_plans.id")),  # null: no plan from then on
    sa.Column("effective_at", UtcDateTime, nullable=False),
    sa.Index("ix_subscriptions_tenant_id_effective_at", "tenant_id", "effective_at"),
)
