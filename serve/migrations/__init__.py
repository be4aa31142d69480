"""Alembic's environment; `serve.db.Store.migrate` runs it, there is no alembic.ini."""
