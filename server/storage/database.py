"""The database: connections for writing and for reading, transactions, migrations at start-up. `tables` has the schema.

Readers have connections of their own, so they wait neither for a writer nor for a connection that a writer holds.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock
from sqlalchemy import Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from reftserve.client.schemas.unicode import whole
from reftserve.server.errors import Conflict, StorageFull, Unavailable
from reftserve.server.storage.reserve import Reserve
from reftserve.server.storage.tables import Identity

BUSY_TIMEOUT_MS = 30_000
READERS = 40  # connections; as many as the server has threads for requests
DATABASE_ERRORS = (OperationalError, InterfaceError)  # the database is unreachable or breaks off
# A shared-memory file of SQLite that cannot grow is a full disk too.
FULL = {"SQLITE_FULL", "SQLITE_IOERR_SHMSIZE", "SQLITE_IOERR_SHMMAP"}
POSTGRESQL_FULL = "53100"


class Database:
    """A database by SQLAlchemy URL. SQLite uses WAL and syncs every commit, so acknowledged writes survive a crash.

    reserve_bytes: disk space beside an SQLite file that is kept for deletions.
    """

    def __init__(self, url: str, *, reserve_bytes: int = 0) -> None:
        self.url = make_url(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine: Engine = create_engine(url, pool_pre_ping=True, json_deserializer=_read_json)
        self.reader: Engine = create_engine(
            url,
            pool_pre_ping=True,
            json_deserializer=_read_json,
            pool_size=READERS,
            max_overflow=0,
            execution_options={"postgresql_readonly": True},
        )
        file = self.url.database if self.is_sqlite else None
        self.reserve = Reserve(None if file in (None, "", ":memory:") else Path(f"{file}.reserve"), reserve_bytes)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _configure_writer)
            event.listen(self.reader, "connect", _configure_reader)
            # The driver would begin a transaction late, as a reader. One that begins so fails at its first write if
            # another has written since; a writer waits.
            event.listen(self.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            event.listen(self.reader, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))

    @contextmanager
    def session(self, *, may_use_reserve: bool = False) -> Iterator[Session]:
        """Open a writing transaction; commit it, or roll back on any exception. Raises StorageFull for a full disk.

        may_use_reserve: it deletes rows or ends work, so it must succeed on a full disk.
        """
        if may_use_reserve:
            with self.reserve.lent(), self._transaction() as session:
                yield session
        else:
            self.reserve.require()
            with self._transaction() as session:
                yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a read-only transaction, which waits for no writer."""
        with Session(self.reader, expire_on_commit=False) as session:
            yield session

    def migrate(self) -> None:
        """Migrate to the newest schema; processes that start together take turns.

        Raises Unavailable when the database cannot be read, Conflict when a newer release has made it.
        """
        from alembic import command  # slow to import, and needed once
        from alembic.config import Config
        from alembic.util import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        config.attributes["engine"] = self.engine
        try:
            with self.reserve.lent(), self._migration_lock():
                command.upgrade(config, "head")
        except CommandError as cause:
            raise Conflict(
                f"the database {self} has a schema of a newer release ({cause}); upgrade reftserve, or give another "
                "database_url"
            ) from cause
        except DatabaseError as cause:
            if isinstance(cause, OperationalError) and _is_full(cause):
                raise StorageFull(f"the disk of the database {self} is full; make room and start again") from cause
            if not is_unavailable(cause):
                raise
            raise Unavailable(
                f"the database {self} cannot be used: {cause.orig}; mend or restore it, or set database_url",
                code="database_unavailable",
            ) from cause

    def is_reachable(self) -> bool:
        """Say whether the database can be read; this waits for no writer."""
        try:
            with self.reading() as session:
                session.execute(select(Identity.id))
        except (DatabaseError, PoolTimeout):
            return False
        return True

    def now(self, session: Session) -> float:
        """Return Unix seconds by the clock that all processes share: the database's, or this machine's for SQLite."""
        if self.is_sqlite:
            return time.time()
        return float(session.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())

    def advisory_lock(self, session: Session, subject: str) -> None:
        """Serialize writing transactions on a subject until each ends; SQLite serializes all writing transactions."""
        if not self.is_sqlite:
            lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:subject, 0))")
            session.execute(lock, {"subject": subject})

    def close(self) -> None:
        """Close all connections."""
        self.reader.dispose()
        self.engine.dispose()

    def __str__(self) -> str:
        return self.url.render_as_string(hide_password=True)

    @contextmanager
    def _transaction(self) -> Iterator[Session]:
        with Session(self.engine, expire_on_commit=False) as session:
            try:
                yield session
                session.commit()
            except OperationalError as cause:
                if not _is_full(cause):
                    raise
                self.reserve.give_up()  # a quota is used up, which the file system's free space does not show
                raise StorageFull("the disk is full; nothing was stored") from cause

    @contextmanager
    def _migration_lock(self) -> Iterator[None]:
        file = self.url.database if self.is_sqlite else None
        # The lock would make a missing folder, which is more likely a wrong path or a disk that is not mounted.
        if file not in (None, "", ":memory:") and Path(str(file)).parent.exists():
            with FileLock(f"{file}.migrate.lock"):
                yield
        else:
            with self.engine.connect() as connection:
                connection.execute(text("SELECT pg_advisory_lock(7263)"))
                try:
                    yield
                finally:
                    connection.execute(text("SELECT pg_advisory_unlock(7263)"))


def is_unavailable(error: SQLAlchemyError) -> bool:
    """Say whether the database is locked, away or damaged; other errors are faults of the program."""
    if isinstance(error, DBAPIError) and isinstance(error.orig, sqlite3.DatabaseError):
        # sqlite3 raises its base class for a damaged file.
        return isinstance(error, DATABASE_ERRORS) or type(error.orig) is sqlite3.DatabaseError
    return isinstance(error, (*DATABASE_ERRORS, PoolTimeout))


def _is_full(error: OperationalError) -> bool:
    name, state = getattr(error.orig, "sqlite_errorname", None), getattr(error.orig, "sqlstate", None)
    return name in FULL or state == POSTGRESQL_FULL


def _read_json(stored: str | bytes) -> Any:
    # Rows older than the check of requests may hold half a surrogate pair, which an answer cannot encode.
    decoded = stored if isinstance(stored, str) else stored.decode()
    value = json.loads(decoded)
    return whole(value) if "\\ud" in decoded.lower() else value


def _configure_writer(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _configure_reader(connection: sqlite3.Connection, record: Any) -> None:
    connection.isolation_level = None
    for pragma in ("query_only=ON", f"busy_timeout={BUSY_TIMEOUT_MS}"):
        connection.execute(f"PRAGMA {pragma}")
