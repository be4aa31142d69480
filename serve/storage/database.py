"""Store: connects to the database, runs transactions and migrates the schema.

SQLite in WAL mode is the default, PostgreSQL is chosen by URL; callers use the same code for both. Every
transaction is either `read`, which sees one snapshot of the store, or `write`. On SQLite a write takes the
lock at its start (BEGIN IMMEDIATE): a transaction that reads first and upgrades later can fail with
SQLITE_BUSY at once, whatever the busy timeout (https://www.sqlite.org/isolation.html). On PostgreSQL writes
run concurrently, and each statement sees what was committed before it. A write that depends on a read must
lock the row (`with_for_update`) or be conditional.
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
    """Return an INSERT that supports ON CONFLICT, which SQLAlchemy implements per dialect."""
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


# Ids of tables that grow with each request: 2³¹ rows, two per request, last twelve days at 1,000 requests a
# second. SQLite assigns 64-bit row ids only if the column's type is INTEGER.
RowId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """Stores a point in time: always timezone-aware UTC in Python. SQLite stores no time zone."""

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


class _TimedLock:
    """Locks with a time-out: `with` raises StoreUnavailable after `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout_s):
            raise StoreUnavailable()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class Store:
    """Gives access to the database. Its methods block: async code calls them in a thread."""

    def __init__(self, url: str) -> None:
        self.url = url
        parsed = sa.make_url(url)
        self._postgresql = parsed.get_backend_name() in ("postgresql", "postgres")
        # Parameters hold clients' data and digests of keys, so logged errors do not show them.
        self._engine = sa.create_engine(
            postgresql.url_of(parsed) if self._postgresql else parsed,
            pool_size=8,
            max_overflow=8,
            pool_timeout=5,
            hide_parameters=True,
        )
        self._write_lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._postgresql:
            postgresql.prepare(self._engine)
        else:
            # One writer of this process at a time: SQLite waits by polling, without order. Among many threads
            # of many gateways, some would not get the lock within its five seconds.
            self._write_lock = _TimedLock(WRITER_TIMEOUT_S)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite)

    def __repr__(self) -> str:
        return f"Store({self._engine.url.set(query={})!r})"  # which leaves out the password

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """Run a read-only transaction. Raises StoreUnavailable if the database cannot be reached."""
        with self._transaction(write=False) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """Run a transaction that commits on exit and rolls back on any exception.

        Raises StoreUnavailable if the database cannot be reached or stays locked.
        """
        with self._write_lock, self._transaction(write=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, write: bool) -> Iterator[sa.Connection]:
        try:
            with self._begin_reconnecting(write=write) as connection:
                yield connection
                connection.commit()  # not reached if the block raises: then closing rolls back
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.TimeoutError) as error:
            raise StoreUnavailable() from error
        except sa.exc.DBAPIError as error:
            if error.connection_invalidated or (write and postgresql.takes_no_writes(error)):
                raise StoreUnavailable() from error
            raise

    def _begin_reconnecting(self, *, write: bool) -> sa.Connection:
        """Return a connection in a new transaction.

        A pooled connection may have died while it was idle. BEGIN serves as the ping, so there is no extra
        round trip. A dead connection invalidates the whole pool, so the second try gets a new one.
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
        """Migrate the schema to the newest revision. Safe to repeat, and in several processes at a time."""
        if not self._postgresql and self._engine.url.database:
            Path(self._engine.url.database).parent.mkdir(parents=True, exist_ok=True)
        with self.write() as connection:
            migration_lock = (
                postgresql.migrating(connection) if self._postgresql else contextlib.nullcontext()
            )
            with migration_lock:
                command.upgrade(_alembic_config(connection), "head")

    def close(self) -> None:
        self._engine.dispose()


def _alembic_config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", "serve.storage:migrations")
    config.attributes["connection"] = connection
    return config


def _configure_sqlite(dbapi_connection: Any, _record: Any) -> None:
    dbapi_connection.isolation_level = None  # `_begin_sqlite` sends BEGIN
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=5000", "foreign_keys=ON"):
        dbapi_connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get("bespoke_write", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
