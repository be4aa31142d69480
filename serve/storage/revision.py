"""One number that grows with each change of what gateways and replicas may remember.

Versions, aliases and who pays which plan: whoever remembers them remembers the number that they were read
at, and compares. It is visible together with the change.
"""

import sqlalchemy as sa

from serve.storage.database import metadata

revision_table = sa.Table(
    "registry_revision",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.CheckConstraint("id = 1", name="one_row"),
)


def current(connection: sa.Connection) -> int:
    return int(connection.exec_driver_sql("SELECT revision FROM registry_revision").scalar_one())


def lock(connection: sa.Connection) -> None:
    """No other change overlaps what this transaction does now, so revisions commit in order."""
    connection.execute(sa.select(revision_table.c.revision).with_for_update())


def count_change(connection: sa.Connection) -> None:
    connection.execute(revision_table.update().values(revision=revision_table.c.revision + 1))
