"""The tables of tenants and keys, and the one way to read them page by page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from serve.db import UtcDateTime, metadata
from serve.errors import InvalidRequest

Item = TypeVar("Item")

tenants_table = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String(63), primary_key=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("suspended_at", UtcDateTime),
    sa.Column("scopes", sa.String(255)),
)

projects_table = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String(63), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("archived_at", UtcDateTime),
    sa.UniqueConstraint("tenant_id", "name"),
)

keys_table = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("hint", sa.String(16), nullable=False),
    sa.Column("scopes", sa.String(255), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("project_id", sa.ForeignKey("projects.id")),
    sa.Column("name", sa.String(100)),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
    sa.Column("successor_id", sa.String(32)),
)

platform_keys_table = sa.Table(
    "platform_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("hint", sa.String(16), nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime),
    sa.Column("revoked_at", UtcDateTime),
    sa.Column("last_used_at", UtcDateTime),
)


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Part of a list; `has_more` says that there are items behind the last one."""

    items: Sequence[Item]
    has_more: bool


def page(
    connection: sa.Connection,
    table: sa.Table,
    *where: sa.ColumnElement[bool],
    after: str | None,
    limit: int | None,
) -> Page[sa.Row[Any]]:
    """The rows of `table` behind the row whose id is `after`, oldest first; all of them without a limit.

    Raises InvalidRequest if none of the rows in question has that id.
    """
    c = table.c
    query = sa.select(table).where(*where).order_by(c.created_at, c.id)
    if after is not None:
        cursor = connection.execute(sa.select(c.created_at).where(c.id == after, *where)).first()
        if cursor is None:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        at = cursor.created_at
        query = query.where(sa.or_(c.created_at > at, sa.and_(c.created_at == at, c.id > after)))
    if limit is None:
        return Page(connection.execute(query).all(), False)
    rows = connection.execute(query.limit(limit + 1)).all()
    return Page(rows[:limit], len(rows) > limit)
