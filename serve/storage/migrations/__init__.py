"""Alembic's environment; `serve.storage.database.Store.migrate` runs it, there is no alembic.ini."""
