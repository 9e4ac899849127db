"""What the machine must give before anything starts: folders that can be written, a database and a store that open.

Each check returns one line for `reftserve doctor`, or raises a ServerError, which says what to set. `serve` and
`worker` make the same checks before their slow imports.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reftserve.server.errors import Conflict, Unavailable
from reftserve.server.settings import Settings

GIB = 1 << 30
EXTRAS = {"psycopg": "postgres", "s3fs": "s3"}  # packages that an extra of ours installs


def check_environment(settings: Settings) -> None:
    """Make the checks without which nothing starts. Raises ServerError."""
    for check in (check_data_folder, check_temporary_folder, check_database, check_store):
        check(settings)


def check_data_folder(settings: Settings) -> str:
    """Create the data folder and write a file in it."""
    folder = settings.data
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError) as cause:
        raise Conflict(f"the data folder {folder} is, or lies below, a file; set --data to a folder") from cause
    except OSError as cause:
        raise Conflict(
            f"the data folder {folder.absolute()} cannot be written ({cause.strerror}); make it writable for user "
            f"{os.getuid()}, or set --data to another folder"
        ) from cause
    return f"{folder.resolve()}, {shutil.disk_usage(folder).free / GIB:.1f} GiB free"


def check_temporary_folder(settings: Settings) -> str:
    """Name the folder of temporary files, where uploads arrive."""
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as cause:
        raise Conflict("no folder for temporary files can be written; set TMPDIR to one") from cause
    asked = os.environ.get("TMPDIR")
    instead = "" if asked in (None, "", folder) else f", because TMPDIR ({asked}) cannot be written"
    return f"{folder}{instead}, {shutil.disk_usage(folder).free / GIB:.1f} GiB free"


def check_database(settings: Settings) -> str:
    """Open the database if it exists, without changing it."""
    from sqlalchemy import create_engine, make_url, text  # slow to import
    from sqlalchemy.exc import SQLAlchemyError

    try:
        url = make_url(settings.resolved_database_url)
        if url.get_backend_name() == "sqlite":
            return _check_sqlite(Path(url.database or ""))
        with create_engine(url).connect() as connection:
            connection.execute(text("SELECT 1"))
    except ModuleNotFoundError as cause:
        if cause.name == "psycopg2":  # for postgresql:// in SQLAlchemy 2.0
            raise Conflict(
                "the database's URL needs another driver; write postgresql+psycopg:// in --database-url"
            ) from cause
        package = f"pip install 'reftserve[{EXTRAS.get(cause.name or '', 'server')}]'"
        raise Conflict(f"the database needs a package ({cause}); {package}, or set another --database-url") from cause
    except SQLAlchemyError as cause:
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise Unavailable(f"the database cannot be used: {reason}; check --database-url") from cause
    return f"{url.render_as_string()} answers"


def _check_sqlite(file: Path) -> str:
    if not file.exists():
        return f"{file} does not exist yet"
    try:
        connection = sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)
        try:
            [[tables]] = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table'").fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError as cause:
        if cause.sqlite_errorcode & 0xFF in (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
        ):  # the rest tells the kind of lock
            raise Unavailable(
                f"the database {file} is locked: another process writes; stop it, or try again"
            ) from cause
        raise Conflict(f"the database {file} cannot be opened: {cause}; check its permissions") from cause
    except sqlite3.DatabaseError as cause:
        raise Conflict(
            f"the database {file} is damaged: {cause}; put a backup in its place, or move it away together with "
            f"{file.name}-wal to begin with an empty one"
        ) from cause
    return f"{file}, {tables} tables"


def check_store(settings: Settings) -> str:
    """Find the file system of files and artifacts."""
    import fsspec  # slow to import

    try:
        fsspec.core.url_to_fs(settings.resolved_blob_url)
    except (ImportError, ValueError) as cause:
        scheme = settings.resolved_blob_url.partition("://")[0]
        extra = "; pip install 'reftserve[s3]'" if scheme == "s3" else ""
        raise Conflict(f"the store {scheme}:// cannot be used: {cause}{extra}; check --blob-url") from cause
    return settings.resolved_blob_url


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """Bind the address of the settings until the context ends. Raises Conflict when it is in use or wrong."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((settings.host, settings.port))
        except OSError as cause:
            if cause.errno == errno.EADDRINUSE:
                raise Conflict(
                    f"port {settings.port} of {settings.host} is in use; choose another with --port"
                ) from cause
            raise Conflict(f"cannot listen on {settings.host}:{settings.port}: {cause.strerror}") from cause
        yield listener
