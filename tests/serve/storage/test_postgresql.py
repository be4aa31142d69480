"""Tests invariant 6 on PostgreSQL: a stuck or unreachable store fails in time, without its password."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from urllib.parse import quote, urlsplit

import psycopg
import pytest
import sqlalchemy as sa

from serve.errors import StoreUnavailable
from serve.storage import postgresql
from serve.storage.database import Store
from tests.support.postgres import MigratedDatabases, Postgres

ADD = "INSERT INTO tenants (id, created_at) VALUES ('acme', now())"
COUNT = "SELECT count(*) FROM tenants"


@pytest.fixture
def url(migrated_databases: MigratedDatabases) -> Iterator[str]:
    with migrated_databases.borrow() as url:
        yield url


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    with closing(Store(url)) as store:
        yield store


def count(store: Store) -> int:
    with store.read() as connection:
        return int(connection.exec_driver_sql(COUNT).scalar_one())


def add(store: Store) -> None:
    with store.write() as connection:
        connection.exec_driver_sql(ADD)


def with_options(url: str, options: str) -> str:
    return f"{url}?options={quote(options)}"


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_a_url_may_begin_as_other_programs_write_it(url: str, scheme: str) -> None:
    with closing(Store(url.replace("postgresql", scheme, 1))) as store:
        assert count(store) == 0


def test_nothing_shows_the_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    password = urlsplit(url).password
    assert password is not None
    wrong = (url.replace(password, f"{password}x"), url.rpartition(":")[0] + ":1/away", f"{url}-away")
    for one in (*wrong, f"{url}?password={password}"):
        with closing(Store(one)) as store:
            shown = [repr(store), f"{store}"]
            with suppress(StoreUnavailable):
                add(store)
            with pytest.raises(StoreUnavailable) as error, store.read() as connection:
                connection.exec_driver_sql("SELECT pg_terminate_backend(pg_backend_pid())")
            shown += [str(error.value), repr(error.value), str(error.value.__cause__), caplog.text]
        assert not [text for text in shown if password in text]


def test_an_error_does_not_show_what_was_to_be_written(store: Store) -> None:
    statement = sa.text("INSERT INTO tenants (id) VALUES (:id)")
    with pytest.raises(sa.exc.IntegrityError) as error, store.write() as connection:
        connection.execute(statement, {"id": "a-secret"})
    assert "[parameters" not in str(error.value)


def test_a_nul_from_a_client_is_no_error(store: Store) -> None:
    with store.write() as connection:
        add, find = (
            sa.text("INSERT INTO tenants (id, created_at) VALUES (:id, now())"),
            sa.text("SELECT id FROM tenants WHERE id = :id"),
        )
        connection.execute(add, {"id": "acme"})
        assert connection.execute(find, {"id": "ac\0me"}).all() == []
        connection.execute(add, {"id": "nul\0"})
        assert connection.execute(find, {"id": "nul\0"}).scalar_one() == "nul\ufffd"


def test_a_sum_is_an_integer(store: Store) -> None:
    with store.read() as connection:
        total = connection.exec_driver_sql("SELECT sum(n) FROM (VALUES (9000000000000000000), (1)) AS v (n)")
        assert repr(total.scalar_one()) == "9000000000000000001"


def test_a_read_cannot_write(store: Store) -> None:
    with pytest.raises(sa.exc.InternalError, match="read-only"), store.read() as connection:
        connection.exec_driver_sql(ADD)


def test_connections_that_died_are_replaced_unnoticed(store: Store, url: str) -> None:
    for use in (count, add, count):
        with store.read() as one, store.read() as another:  # so that there are two in the pool
            for connection in (one, another):
                connection.exec_driver_sql("SELECT 1")
        with psycopg.connect(url) as administrator:
            administrator.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid != pg_backend_pid()"
            )
        use(store)
    assert count(store) == 1


def test_a_connection_that_dies_in_mid_transaction_is_unavailable_and_leaves_nothing(store: Store) -> None:
    with pytest.raises(StoreUnavailable), store.write() as connection:
        connection.exec_driver_sql(f"{ADD}; SELECT pg_terminate_backend(pg_backend_pid())")
    assert count(store) == 0


def test_a_killed_server_is_unavailable_until_it_is_back_and_has_what_was_committed(
    store: Store, postgres: Postgres
) -> None:
    add(store)
    postgres.kill()
    try:
        for use in (count, add):
            with pytest.raises(StoreUnavailable):
                use(store)
    finally:
        postgres.start()
    assert count(store) == 1


def test_a_frozen_server_is_unavailable_and_not_waited_for(
    url: str, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql._Connection, "silence_timeout_s", 0.5)
    with closing(Store(f"{url}?connect_timeout=2")) as store:
        assert count(store) == 0
        postgres.freeze()
        try:
            began_s = time.monotonic()
            with pytest.raises(StoreUnavailable):
                count(store)
            assert time.monotonic() - began_s < 10
        finally:
            postgres.thaw()
        assert count(store) == 0


def test_a_statement_that_takes_too_long_is_unavailable(url: str) -> None:
    with (
        closing(Store(with_options(url, "-c statement_timeout=100"))) as store,
        pytest.raises(StoreUnavailable),
        store.read() as connection,
    ):
        connection.exec_driver_sql("SELECT pg_sleep(60)")


def test_a_row_that_stays_locked_is_unavailable(url: str, store: Store) -> None:
    add(store)
    with closing(Store(with_options(url, "-c lock_timeout=100"))) as hasty, store.write() as holding:
        holding.exec_driver_sql("UPDATE tenants SET created_at = now()")
        with pytest.raises(StoreUnavailable), hasty.write() as connection:
            connection.exec_driver_sql("UPDATE tenants SET created_at = now()")


def test_a_server_that_takes_no_writes_is_unavailable_for_them(url: str) -> None:
    with closing(Store(with_options(url, "-c default_transaction_read_only=on"))) as store:
        assert count(store) == 0
        with pytest.raises(StoreUnavailable):
            add(store)


def test_the_time_outs_are_the_servers_and_what_the_url_says_comes_first(url: str, store: Store) -> None:
    def setting(store: Store, name: str) -> object:
        with store.read() as connection:
            return connection.exec_driver_sql(f"SHOW {name}").scalar_one()

    assert setting(store, "statement_timeout") == f"{postgresql.STATEMENT_TIMEOUT_S}s"
    assert setting(store, "lock_timeout") == f"{postgresql.LOCK_TIMEOUT_S}s"
    with closing(Store(with_options(url, "-c lock_timeout=7s"))) as other:
        assert setting(other, "lock_timeout") == "7s"
        assert setting(other, "statement_timeout") == f"{postgresql.STATEMENT_TIMEOUT_S}s"
