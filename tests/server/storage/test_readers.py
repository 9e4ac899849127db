"""Readers never wait for a writer; a database that cannot answer is a 503 with Retry-After, and faults stay 500."""

from __future__ import annotations

import asyncio
import errno
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import psycopg
import pytest
from fastapi import FastAPI
from sqlalchemy import create_engine, select, text
from sqlalchemy.exc import DatabaseError, IntegrityError, InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException

from reftserve.server.api.error_responses import install_error_handlers
from reftserve.server.storage import database as database_module
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Intervention

KILL_OTHERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
WRITERS = 30  # more than the connections of a pool


def add(database: Database, name: str) -> None:
    with database.session() as session:
        session.add(Intervention(owner="o", name=name, next_version=1, created_at=0))


def test_reads_and_readiness_wait_neither_for_a_writer_nor_for_waiting_writers(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    add(database, "first")
    begun, end = threading.Event(), threading.Event()

    def write_slowly() -> None:
        with database.session() as session:
            session.add(Intervention(owner="o", name="slow", next_version=1, created_at=0))
            session.flush()
            begun.set()
            end.wait(30)

    threads = [threading.Thread(target=write_slowly)]
    threads[0].start()
    assert begun.wait(10)
    if database.is_sqlite:
        threads += [threading.Thread(target=add, args=(database, f"n{number}")) for number in range(WRITERS)]
        for thread in threads[1:]:
            thread.start()
    for _ in range(20):
        assert database.is_reachable()
        with database.reading() as session:
            assert session.scalars(select(Intervention.name)).all() == ["first"]
    assert not end.is_set()
    assert all(thread.is_alive() for thread in threads), "no writer has gone on, so the reads did not wait for one"
    end.set()
    for thread in threads:
        thread.join()
    database.close()


def test_a_reading_connection_cannot_write(database_url: str) -> None:
    database = Database(database_url)
    database.migrate()
    with database.reading() as session, pytest.raises(SQLAlchemyError, match=r"read.?only"):
        session.execute(text("DELETE FROM interventions"))
    database.close()


def answer(raises: Callable[[], object]) -> httpx.Response:
    app = FastAPI()
    install_error_handlers(app)
    app.get("/")(raises)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)

    async def get() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    return asyncio.run(get())


def test_a_database_that_is_locked_beyond_its_timeout_is_a_503(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_MS", 50)
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    other = sqlite3.connect(tmp_path / "test.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    refused = answer(lambda: add(database, "n"))
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "database_unavailable")
    assert int(refused.headers["Retry-After"]) > 0
    assert database.is_reachable()
    other.close()
    assert answer(lambda: add(database, "n")).status_code == 200


def test_a_database_that_is_damaged_while_the_server_runs_is_a_503(tmp_path: Path) -> None:
    file = tmp_path / "test.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    assert answer(lambda: add(database, "n")).status_code == 503
    assert not database.is_reachable()


def test_a_postgresql_server_that_goes_away_is_a_503(postgresql: str) -> None:
    database = Database(postgresql)
    database.migrate()

    def write_without_server() -> None:
        with database.session() as session:
            session.execute(text("SELECT 1"))
            with create_engine(postgresql).connect() as killer:
                killer.execute(
                    text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
                )
            session.execute(text("SELECT 1"))

    assert answer(write_without_server).status_code == 503
    assert answer(lambda: {"reachable": database.is_reachable()}).json() == {"reachable": True}
    database.close()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OperationalError("x", {}, psycopg.OperationalError("the connection is lost")), 503),
        (InterfaceError("x", {}, psycopg.InterfaceError("the cursor is closed")), 503),
        (PoolTimeout("no connection is free"), 503),
        (DatabaseError("x", {}, sqlite3.DatabaseError("database disk image is malformed")), 503),
        (IntegrityError("x", {}, sqlite3.IntegrityError("UNIQUE constraint failed")), 500),
        (DatabaseError("x", {}, sqlite3.DataError("too big")), 500),
    ],
)
def test_only_a_database_that_cannot_answer_is_a_503(error: SQLAlchemyError, status: int) -> None:
    def fail() -> None:
        raise error

    assert answer(fail).status_code == status


def test_uploads_that_fill_the_temporary_folder_are_a_507_that_names_it() -> None:
    def fail() -> None:
        raise HTTPException(400, "There was an error parsing the body") from OSError(errno.ENOSPC, "no space")

    refused = answer(fail)
    assert refused.status_code == 507
    assert "set TMPDIR" in refused.json()["error"]["message"]
