"""Connects to PostgreSQL: sets the driver, the time-outs and how transactions begin.

Every wait has a time-out. The server ends a statement or a lock wait that takes too long. The client gives
up on a server that sends nothing at all (frozen, its disk gone, a network that drops packets).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from psycopg.abc import Buffer, PQGen
from psycopg.types.numeric import IntLoader
from psycopg.types.string import StrDumperUnknown

CONNECT_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 10
SILENCE_TIMEOUT_S = 15.0
# A gateway that stops within a transaction must not keep its tenants' rows locked.
IDLE_IN_TRANSACTION_TIMEOUT_S = 60
MIGRATION_TIMEOUT_S = 600

# A read sees one snapshot of the store for all its queries, as on SQLite. It cannot fail because of a lock or
# a concurrent write.
BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
BEGIN_WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED"

_MIGRATION_LOCK = int.from_bytes(b"bespoke", "big")
_READ_ONLY_SQL_TRANSACTION = "25006"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


_RV = TypeVar("_RV")


class _Text(StrDumperUnknown):
    """Replaces NUL in text, which PostgreSQL cannot store but clients may send.

    Such a look-up then finds nothing, as on SQLite, and such a name is stored with a replacement character.
    """

    def dump(self, obj: str) -> Buffer | None:
        return super().dump(obj.replace("\0", "\ufffd"))


class _Connection(psycopg.Connection[Any]):
    """Closes the connection if the server sends nothing for `silence_timeout_s`."""

    silence_timeout_s = SILENCE_TIMEOUT_S

    def wait(self, gen: PQGen[_RV], interval: float = 0.1, timeout: float | None = None) -> _RV:
        try:
            return super().wait(gen, interval, self.silence_timeout_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()
            raise


def url_of(url: sa.URL) -> sa.URL:
    """Return the URL with our driver and time-outs. Options in the URL take precedence."""
    server = {
        "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
        "lock_timeout": f"{LOCK_TIMEOUT_S}s",
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_TIMEOUT_S}s",
    }
    options = [f"-c {name}={value}" for name, value in server.items()]
    if "options" in url.query:
        options.append(str(url.query["options"]))  # last, so the URL's options win
    client = {
        "connect_timeout": str(CONNECT_TIMEOUT_S),
        "application_name": "bespoke",
        "keepalives_idle": "30",
        "keepalives_interval": "10",
        "keepalives_count": "3",
    }
    query = client | dict(url.query) | {"options": " ".join(options)}
    return url.set(drivername="postgresql+psycopg", query=query)


def prepare(engine: sa.Engine) -> None:
    sa.event.listen(engine, "do_connect", _connect)
    sa.event.listen(engine, "begin", _begin)


def _connect(
    _dialect: sa.Dialect, _record: Any, arguments: list[Any], options: dict[str, Any]
) -> _Connection:
    # `_begin` sends BEGIN.
    connection = _Connection.connect(*arguments, autocommit=True, **options)
    connection.adapters.register_dumper(str, _Text)
    # PostgreSQL sums integers to `numeric`. The store has only whole numbers, so they are read as int.
    connection.adapters.register_loader("numeric", IntLoader)
    return connection


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("bespoke_write", True)
    connection.exec_driver_sql(BEGIN_WRITE if write else BEGIN_READ)


def takes_no_writes(error: sa.exc.DBAPIError) -> bool:
    """Return whether a write failed because the server is read-only.

    That is a standby, or a server that was made read-only after its disk ran full.
    """
    return getattr(error.orig, "sqlstate", None) == _READ_ONLY_SQL_TRANSACTION


@contextmanager
def migrating(connection: sa.Connection) -> Iterator[None]:
    """Let one process migrate at a time. Statements may take as long as a large table needs."""
    dbapi_connection: Any = connection.connection.dbapi_connection
    dbapi_connection.silence_timeout_s = MIGRATION_TIMEOUT_S
    try:
        for name in ("statement_timeout", "lock_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {name} = '{MIGRATION_TIMEOUT_S}s'")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        # A wait for a table lock blocks all later statements on that table, so it must be short.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        yield
    finally:
        dbapi_connection.silence_timeout_s = SILENCE_TIMEOUT_S
