"""Lists in pages, as OpenAI's API has them: newest or oldest first, behind a given id."""

from typing import Any

import sqlalchemy as sa

from serve.errors import InvalidRequest
from serve.tenants import Page


def listing(
    connection: sa.Connection,
    table: sa.Table,
    *where: sa.ColumnElement[bool],
    after: str | None,
    limit: int,
    newest_first: bool,
) -> Page[sa.Row[Any]]:
    """At most `limit` rows of `table`, behind the row whose id is `after`.

    Raises InvalidRequest if none of the rows in question has that id.
    """
    c = table.c
    query = sa.select(table).where(*where)
    if after is not None:
        found = sa.select(c.created_at).where(c.id == after, *where)
        cursor = connection.execute(found).first() if after.isprintable() else None
        if cursor is None:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        at = cursor.created_at
        beyond = c.created_at < at if newest_first else c.created_at > at
        tie = c.id < after if newest_first else c.id > after
        query = query.where(sa.or_(beyond, sa.and_(c.created_at == at, tie)))
    order = (c.created_at.desc(), c.id.desc()) if newest_first else (c.created_at, c.id)
    rows = connection.execute(query.order_by(*order).limit(limit + 1)).all()
    return Page(rows[:limit], len(rows) > limit)
