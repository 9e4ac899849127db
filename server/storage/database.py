"""The database: one engine, sessions that commit or roll back, migrations at start-up."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from reftserve.client.schemas.unicode import whole
from reftserve.server.errors import StorageFull

BUSY_TIMEOUT_MS = 30_000
DATABASE_ERRORS = (OperationalError, InterfaceError)  # what is raised while a database cannot be reached, or breaks off


class Database:
    """Tables by SQLAlchemy URL. SQLite in WAL mode, synced at every commit, so that what was acknowledged stays."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.engine: Engine = create_engine(url, pool_pre_ping=True, json_deserializer=_read_json)
        if self.url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """A writing transaction: committed at the end, rolled back on any exception.

        Raises StorageFull when the disk has no room for it.
        """
        with Session(self.engine, expire_on_commit=False) as session:
            try:
                yield session
                session.commit()
            except OperationalError as cause:
                if "disk is full" in str(cause.orig):
                    raise StorageFull("the disk is full; nothing was stored") from cause
                raise

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and waits for no writer."""
        with Session(self.engine.execution_options(read_only=True), expire_on_commit=False) as session:
            yield session

    def migrate(self) -> None:
        """Bring the schema up to date; processes that start together take turns."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["engine"] = self.engine
        with self._migration_lock():
            command.upgrade(config, "head")

    def is_reachable(self) -> bool:
        """Whether a query comes back."""
        try:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT 1"))
        except DatabaseError:
            return False
        return True

    def now(self, session: Session) -> float:
        """Unix seconds by the clock that all processes share: the database's; this machine's for a local file."""
        if self.url.get_backend_name() == "sqlite":
            return time.time()
        return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def advisory_lock(self, session: Session, subject: str) -> None:
        """Let writing transactions on one subject follow each other, from here to their ends; on SQLite all do."""
        if self.url.get_backend_name() != "sqlite":
            lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:subject, 0))")
            session.execute(lock, {"subject": subject})

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()

    @contextmanager
    def _migration_lock(self) -> Iterator[None]:
        if self.url.get_backend_name() == "sqlite" and self.url.database not in (None, "", ":memory:"):
            with FileLock(f"{self.url.database}.migrate.lock"):
                yield
        else:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT pg_advisory_lock(7263)"))
                try:
                    yield
                finally:
                    connection.execute(text("SELECT pg_advisory_unlock(7263)"))


def _read_json(stored: str | bytes) -> Any:
    # Rows from before requests were checked may hold half a surrogate pair, which no answer can carry.
    text = stored if isinstance(stored, str) else stored.decode()
    value = json.loads(text)
    return whole(value) if "\\ud" in text.lower() else value


def _configure_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    # Transactions are begun by SQLAlchemy's event below: the driver would begin them late, as readers.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A transaction that begins as a reader and then writes fails at once when another wrote meanwhile; one that begins
    # as a writer waits its turn.
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
