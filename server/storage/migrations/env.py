"""Alembic's entry point; runs only from `Database.migrate`, with its engine."""

from __future__ import annotations

from alembic import context

from reftserve.server.storage.tables import Table

with context.config.attributes["engine"].connect() as connection:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()
    connection.commit()
