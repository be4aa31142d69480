"""PostgreSQL as the store: how it is reached, how long it is waited for, how its transactions begin.

Nothing here waits for ever. The server ends a statement or a wait for a lock that takes too long; of a server
that says nothing at all (frozen, its disk gone, a network that swallows packets) the client takes its leave.
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
# A gateway that stands still in mid-transaction must not keep its tenants' rows locked.
IDLE_IN_TRANSACTION_TIMEOUT_S = 60
MIGRATION_TIMEOUT_S = 600

# A read sees one moment of the store, as on SQLite, however many queries it asks. It can fail neither for a
# lock nor for another's write.
BEGIN_READ = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
BEGIN_WRITE = "BEGIN ISOLATION LEVEL READ COMMITTED"

_MIGRATION_LOCK = int.from_bytes(b"bespoke", "big")
_READ_ONLY_SQL_TRANSACTION = "25006"  # https://www.postgresql.org/docs/current/errcodes-appendix.html


_RV = TypeVar("_RV")


class _Text(StrDumperUnknown):
    """Texts of PostgreSQL have no NUL, clients may. They then ask for what is not there, as on SQLite,
    or have a name with a replacement character in it."""

    def dump(self, obj: str) -> Buffer | None:
        return super().dump(obj.replace("\0", "\ufffd"))


class _Connection(psycopg.Connection[Any]):
    """Is not waited for longer than `silence_timeout_s` at a time, and is of no more use after that."""

    silence_timeout_s = SILENCE_TIMEOUT_S

    def wait(self, gen: PQGen[_RV], interval: float = 0.1, timeout: float | None = None) -> _RV:
        try:
            return super().wait(gen, interval, self.silence_timeout_s if timeout is None else timeout)
        except psycopg.errors._WaitTimeout:
            self.pgconn.finish()
            raise


def url_of(url: sa.URL) -> sa.URL:
    """With our driver and our time-outs; what the URL says itself comes first."""
    server = {
        "statement_timeout": f"{STATEMENT_TIMEOUT_S}s",
        "lock_timeout": f"{LOCK_TIMEOUT_S}s",
        "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_TIMEOUT_S}s",
    }
    options = [f"-c {name}={value}" for name, value in server.items()]
    if "options" in url.query:
        options.append(str(url.query["options"]))  # the last word is theirs
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
    # We say BEGIN ourselves, see `_begin`.
    connection = _Connection.connect(*arguments, autocommit=True, **options)
    connection.adapters.register_dumper(str, _Text)
    # What a sum of integers is here. The store has whole numbers only, and Decimal is neither money nor JSON.
    connection.adapters.register_loader("numeric", IntLoader)
    return connection


def _begin(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("bespoke_write", True)
    connection.exec_driver_sql(BEGIN_WRITE if write else BEGIN_READ)


def takes_no_writes(error: sa.exc.DBAPIError) -> bool:
    """Whether a write that failed says that the server takes none: a standby, or one whose disk ran full and
    that its operator, or the cloud, has made read-only."""
    return getattr(error.orig, "sqlstate", None) == _READ_ONLY_SQL_TRANSACTION


@contextmanager
def migrating(connection: sa.Connection) -> Iterator[None]:
    """One process at a time, the others wait; statements may take as long as a large table needs."""
    dbapi_connection: Any = connection.connection.dbapi_connection
    dbapi_connection.silence_timeout_s = MIGRATION_TIMEOUT_S
    try:
        for name in ("statement_timeout", "lock_timeout"):
            connection.exec_driver_sql(f"SET LOCAL {name} = '{MIGRATION_TIMEOUT_S}s'")
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        # Whoever waits for a table has everyone else wait behind: not for long.
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_S}s'")
        yield
    finally:
        dbapi_connection.silence_timeout_s = SILENCE_TIMEOUT_S
