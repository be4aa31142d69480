"""The store: engine, transactions, migrations.

SQLite in WAL mode by default, PostgreSQL by URL; the code above is the same for both. Every
transaction is either `read`, which sees one moment of the store, or `write`. On SQLite a write
takes the lock at its start (BEGIN IMMEDIATE): a transaction that reads first and upgrades later
can fail with SQLITE_BUSY at once, whatever the busy timeout (https://www.sqlite.org/isolation.html).
On PostgreSQL writes run side by side and each statement sees what was committed before it: who
decides by what it has read locks it (`with_for_update`), or writes under a condition.

INSERT that knows ON CONFLICT, which SQLAlchemy spells by dialect.
"""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.dialects import postgresql as postgresql_dialect
from sqlalchemy.dialects import sqlite

from serve.errors import StoreUnavailable
from serve.storage import postgresql


def insert(connection: sa.Connection, table: sa.Table) -> Any:
    return (sqlite if connection.dialect.name == "sqlite" else postgresql_dialect).insert(table)


WRITER_TIMEOUT_S = 10.0

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


# For rows that are added for ever: 2³¹ of them are twelve days at 1,000 requests a second. SQLite numbers
# rows by itself, with 64 bits, only if the column's type is INTEGER.
RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """A point in time, always timezone-aware UTC in Python; SQLite keeps no zone of its own."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("a naive datetime has no meaning in the store")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class _InTurn:
    """A lock that others wait for, but not for ever: then `with` raises StoreUnavailable."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout_s):
            raise StoreUnavailable()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Store:
    """A handle on the database. Its methods block: async code calls them in a thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = sa.make_url(url)
        self._postgresql = parsed.get_backend_name() in ("postgresql", "postgres")
        # Parameters are what clients sent and digests of keys: an error that is logged does not show them.
        self._engine = sa.create_engine(
            postgresql.url_of(parsed) if self._postgresql else parsed,
            pool_size=8,
            max_overflow=8,
            pool_timeout=5,
            hide_parameters=True,
        )
        self._writing: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._postgresql:
            postgresql.prepare(self._engine)
        else:
            # One writer of this process at a time: SQLite's own waiting is a lottery that polls, and among
            # many threads of many gateways some would draw no ticket in its five seconds.
            self._writing = _InTurn(WRITER_TIMEOUT_S)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    def __repr__(self) -> str:
        return f"Store({self._engine.url.set(query={})!r})"  # which leaves out the password

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read-only transaction. Raises StoreUnavailable if the database cannot be reached."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that commits on exit and rolls back on any exception.

        Raises StoreUnavailable if the database cannot be reached or stays locked.
        """
        with self._writing, self._transaction(write=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[sa.Connection]:
        try:
            with self._begun(write=write) as connection:
                yield connection
                connection.commit()  # what leaves earlier is rolled back
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            raise StoreUnavailable() from error
        except sa.exc.DBAPIError as error:
            if error.connection_invalidated or (write and postgresql.takes_no_writes(error)):
                raise StoreUnavailable() from error
            raise

    def _begun(self, *, write: bool) -> sa.Connection:
        """A connection in a new transaction.

        The pool's may have died while nobody used it. The database is told to begin anyway, so that is the
        ping, and costs no round trip of its own. One that is dead takes the pool's others with it: the second
        is new.
        """
        try:
            return self._begin(write=write)
        except sa.exc.DBAPIError as error:
            if not error.connection_invalidated:
                raise
            return self._begin(write=write)

    def _begin(self, *, write: bool) -> sa.Connection:
        connection = self._engine.connect().execution_options(bespoke_write=write)
        try:
            connection.begin()
        except BaseException:
            connection.close()
            raise
        return connection

    def migrate(self) -> None:
        """Bring the schema to the newest revision; safe to run again, and by several processes."""
        if not self._postgresql and self._engine.url.database:
            Path(self._engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        with self.write() as connection:
            turn = postgresql.migrating(connection) if self._postgresql else contextlib.nullcontext()
            with turn:
                command.upgrade(_alembic_config(connection), "head")

    def close(self) -> None:
        self._engine.dispose()


def _alembic_config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "serve.storage:migrations")
    config.attributes["connection"] = connection
    return config


def _configure_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # we say BEGIN ourselves, see `_begin_sqlite`
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        dbapi_connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("bespoke_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
