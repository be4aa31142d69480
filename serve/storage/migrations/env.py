"""Configures alembic. The connection is the caller's, so that a migration is one transaction."""

from alembic import context

from serve.storage.database import metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True
)
with context.begin_transaction():
    context.run_migrations()
