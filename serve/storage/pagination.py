"""Pages through lists as OpenAI's API does: oldest or newest first, behind a given id."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from serve.errors import InvalidRequest

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """Holds part of a list. `has_more` is true if there are items behind the last one."""

    items: Sequence[Item]
    has_more: bool


def page(
    connection: sa.Connection,
    table: sa.Table,
    *where: sa.ColumnElement[bool],
    after: str | None,
    limit: int | None,
    newest_first: bool = False,
) -> Page[sa.Row[Any]]:
    """Return the rows of `table` behind the row with the id `after`, in order of creation.

    Without `limit`, all rows are returned. Raises InvalidRequest if no selected row has that id.
    """
    c = table.c
    query = sa.select(table).where(*where)
    if after is not None:
        cursor_query = sa.select(c.created_at).where(c.id == after, *where)
        cursor = connection.execute(cursor_query).first() if after.isprintable() else None
        if cursor is None:
            raise InvalidRequest("'after' is not the id of an item of this list.", "after", "invalid_value")
        at = cursor.created_at
        beyond = c.created_at < at if newest_first else c.created_at > at
        tie = c.id < after if newest_first else c.id > after
        query = query.where(sa.or_(beyond, sa.and_(c.created_at == at, tie)))
    query = query.order_by(*((c.created_at.desc(), c.id.desc()) if newest_first else (c.created_at, c.id)))
    if limit is None:
        return Page(connection.execute(query).all(), False)
    rows = connection.execute(query.limit(limit + 1)).all()
    return Page(rows[:limit], len(rows) > limit)
