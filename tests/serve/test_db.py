from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

# Every module that declares tables, so that the metadata is whole.
import serve.adapters
import serve.billing.invoice
import serve.billing.ledger
import serve.tenants  # noqa: F401
from serve.db import Store, metadata
from serve.errors import StoreUnavailable


def test_the_migrations_make_exactly_the_tables_that_the_code_declares(store: Store) -> None:
    with store.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_changes_nothing(store: Store) -> None:
    store.migrate()
    store.migrate()


def test_sqlite_runs_in_wal_mode_and_syncs_every_commit(store: Store) -> None:
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_a_write_that_fails_is_rolled_back(store: Store) -> None:
    def half_a_write() -> None:
        with store.write() as connection:
            connection.exec_driver_sql("INSERT INTO tenants VALUES ('acme', '2026-01-01')")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        half_a_write()
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM tenants").scalar() == 0


def test_a_store_that_is_away_is_unavailable(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'no' / 'such' / 'ledger.db'}")
    with pytest.raises(StoreUnavailable), store.read():
        pass
