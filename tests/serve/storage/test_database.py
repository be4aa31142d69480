import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

import serve.batches.batches
import serve.billing.invoicing.invoices
import serve.billing.ledger.ledger
import serve.billing.webhooks.outbox
import serve.client_data.idempotency
import serve.client_data.stored_responses
import serve.client_data.upload_tables
import serve.inference.quarantine
import serve.rate_limits.leases
import serve.rate_limits.limits

# Every module that declares tables, so that the metadata is whole.
import serve.registry.registry
import serve.tenants  # noqa: F401
from serve.errors import StoreUnavailable
from serve.storage.database import Store, metadata
from tests.support.databases import on_sqlite


def test_the_migrations_make_exactly_the_tables_that_the_code_declares(store: Store) -> None:
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(store: Store) -> None:
    store.migrate()
    store.migrate()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").create_database()
    else:
        url = f"sqlite:///{tmp_path / 'ledger.db'}"
    with closing(Store(url)) as store:
        yield store


def test_processes_that_migrate_at_once_take_turns(empty_store: Store) -> None:
    program = "import sys; from serve.storage.database import Store; Store(sys.argv[1]).migrate()"
    running = [subprocess.Popen([sys.executable, "-c", program, empty_store.url]) for _ in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    empty_store.migrate()


@pytest.mark.parametrize(
    "statement",
    ["UPDATE adapters SET state = 'perhaps'", "INSERT INTO registry_revision VALUES (2, 0)"],
)
def test_the_store_itself_refuses_an_unknown_state_and_a_second_revision(
    store: Store, statement: str
) -> None:
    with store.write() as connection:
        connection.exec_driver_sql(
            "INSERT INTO tenants (id, created_at) VALUES ('acme', '2026-01-01 00:00:00')"
        )
        connection.exec_driver_sql(
            "INSERT INTO adapters (tenant_id, name, version, base, registered_at) "
            "VALUES ('acme', 'support', 'a', 'tiny', '2026-01-01 00:00:00')"
        )
    with pytest.raises(sa.exc.IntegrityError), store.write() as connection:
        connection.exec_driver_sql(statement)


@on_sqlite
def test_sqlite_runs_in_wal_mode_and_syncs_every_commit(store: Store) -> None:
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_write_that_fails_is_rolled_back(store: Store) -> None:
    def half_a_write() -> None:
        with store.write() as connection:
            connection.exec_driver_sql("INSERT INTO tenants (id, created_at) VALUES ('acme', '2026-01-01')")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_a_write()
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tenants").scalar() == 0


def test_a_store_that_is_away_is_unavailable(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'no' / 'such' / 'ledger.db'}")
    with pytest.raises(StoreUnavailable), store.read():
        pass


def test_a_read_sees_one_moment_of_the_store(store: Store) -> None:
    count = "SELECT count(*) FROM tenants"
    with store.read() as reading:
        assert reading.exec_driver_sql(count).scalar() == 0
        with store.write() as writing:
            writing.exec_driver_sql("INSERT INTO tenants (id, created_at) VALUES ('acme', '2026-01-01')")
        assert reading.exec_driver_sql(count).scalar() == 0
    with store.read() as reading:
        assert reading.exec_driver_sql(count).scalar() == 1
