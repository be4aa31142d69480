"""Declares the tables of uploads in parts. Both `files`, which counts them, and `uploads` use them."""

import sqlalchemy as sa

from serve.storage.database import UtcDateTime, metadata

PART_PREFIX = "part_"
PENDING, COMPLETED, CANCELLED = "pending", "completed", "cancelled"

uploads_table = sa.Table(
    "uploads",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("purpose", sa.String(16), nullable=False),
    sa.Column("filename", sa.String(255), nullable=False),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("status", sa.String(12), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False, index=True),
    sa.Column("file_expires_after_s", sa.Integer),
    sa.Column("file_id", sa.ForeignKey("files.id")),
    sa.CheckConstraint("bytes > 0", name="bytes_positive"),
    sa.Index("ix_uploads_tenant_id_status", "tenant_id", "status"),
)

parts_table = sa.Table(
    "upload_parts",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("upload_id", sa.ForeignKey("uploads.id"), nullable=False, index=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.CheckConstraint("bytes >= 0", name="bytes_not_negative"),
)
