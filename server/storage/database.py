"""The database: one SQLAlchemy engine, transactions, migrations at start-up. `tables` holds the schema."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError
from sqlalchemy.orm import Session

from reftserve.client.schemas.unicode import whole
from reftserve.server.errors import StorageFull

BUSY_TIMEOUT_MS = 30_000
DATABASE_ERRORS = (OperationalError, InterfaceError)  # the database is unreachable or breaks off


class Database:
    """A database by SQLAlchemy URL. SQLite uses WAL and syncs every commit, so acknowledged writes survive a crash."""

    def __init__(self, url: str) -> None:
        self.url = make_url(url)
        self.engine: Engine = create_engine(url, pool_pre_ping=True, json_deserializer=_read_json)
        if self.url.get_backend_name() == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_transaction)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """Open a writing transaction; commit it, or roll back on any exception. Raises StorageFull for a full disk."""
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
        """Open a read-only transaction, which waits for no writer."""
        with Session(self.engine.execution_options(read_only=True), expire_on_commit=False) as session:
            yield session

    def migrate(self) -> None:
        """Migrate to the newest schema; processes that start together take turns."""
        from alembic import command  # slow to import, and needed once
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["engine"] = self.engine
        with self._migration_lock():
            command.upgrade(config, "head")

    def is_reachable(self) -> bool:
        """Say whether the database answers a query, which waits for no writer."""
        try:
            with self.engine.connect().execution_options(read_only=True) as connection:
                connection.execute(text("SELECT 1"))
        except DatabaseError:
            return False
        return True

    def now(self, session: Session) -> float:
        """Return Unix seconds by the clock that all processes share: the database's, or this machine's for SQLite."""
        if self.url.get_backend_name() == "sqlite":
            return time.time()
        return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def advisory_lock(self, session: Session, subject: str) -> None:
        """Serialize writing transactions on a subject until each ends; SQLite serializes all writing transactions."""
        if self.url.get_backend_name() != "sqlite":
            lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:subject, 0))")
            session.execute(lock, {"subject": subject})

    def close(self) -> None:
        """Close all connections."""
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
    # Rows older than the check of requests may hold half a surrogate pair, which an answer cannot encode.
    decoded = stored if isinstance(stored, str) else stored.decode()
    value = json.loads(decoded)
    return whole(value) if "\\ud" in decoded.lower() else value


def _configure_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    # `_begin_transaction` begins each transaction; the driver would begin it late, as a reader.
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_transaction(connection: Connection) -> None:
    # A transaction that begins as a reader fails at its first write if another has written since; a writer waits.
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
