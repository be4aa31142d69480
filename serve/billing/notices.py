"""Notices: what is told to webhooks. Written down with what they tell of, delivered until they are taken."""

import sqlalchemy as sa

from serve.db import UtcDateTime, metadata

notices_table = sa.Table(
    "notices",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("url", sa.String(512), nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("next_try_at", UtcDateTime, index=True),
    sa.Column("delivered_at", UtcDateTime),
    sa.Column("last_error", sa.String(200)),
    sa.Column("created_at", UtcDateTime, nullable=False),
)
