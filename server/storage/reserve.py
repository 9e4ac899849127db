"""The reserve: disk space kept back beside the SQLite database, so that deleting works on a full disk.

    whole ──a deletion finds the disk nearly full──► given up ──twice its size is free again──► whole

Transactions that create something need the whole reserve, so they cannot use the room that deletions were given.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from reftserve.server.errors import StorageFull

logger = logging.getLogger(__name__)
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_ZEROS = bytes(1 << 20)


class Reserve:
    """A file of `size` bytes. file: None, as for a database server, keeps nothing back."""

    def __init__(self, file: Path | None, size: int) -> None:
        self._file = file if size else None
        self._size = size
        self._lock = threading.Lock()

    def require(self) -> None:
        """Return if the reserve is whole, after making it if need be. Raises StorageFull."""
        # Without its folder the database has a clearer error.
        if self._file is not None and self._file.parent.exists() and not self._ensure(self._file):
            raise StorageFull(
                f"the disk of {self._file.parent} is full; nothing was stored. Delete files, interventions or jobs"
            )

    @contextmanager
    def lent(self) -> Iterator[None]:
        """Let the caller's writes use the reserve, if the disk is nearly full; make it again when there is room."""
        if self._file is not None and self._free(self._file) < self._size:
            self.give_up()
        try:
            yield
        finally:
            if self._file is not None:
                try:
                    self._ensure(self._file)
                except OSError as cause:
                    # The caller's transaction has ended; the next one that creates something tries again.
                    logger.warning("the reserve %s could not be made: %s", self._file, cause)

    def give_up(self) -> None:
        """Free the space."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _is_whole(self, file: Path) -> bool:
        try:
            return file.stat().st_size == self._size
        except FileNotFoundError:
            return False

    def _ensure(self, file: Path) -> bool:
        if self._is_whole(file):
            return True
        with self._lock:
            # Another thread may have made it meanwhile.
            return self._is_whole(file) or self._make(file)

    def _make(self, file: Path) -> bool:
        # Twice the size: less would make the next deletion give the reserve up at once.
        if self._free(file) < 2 * self._size:
            return False
        scratch = file.with_name(f"{file.name}.{uuid.uuid4().hex}.partial")
        try:
            # A file of zeros: truncate() would make a sparse file, which reserves nothing.
            with scratch.open("wb") as opened:
                for start in range(0, self._size, len(_ZEROS)):
                    opened.write(_ZEROS[: self._size - start])
                opened.flush()
                os.fsync(opened.fileno())
            scratch.replace(file)
        except OSError as cause:
            if cause.errno not in NO_ROOM:
                raise
            return False
        finally:
            scratch.unlink(missing_ok=True)
        return True

    def _free(self, file: Path) -> int:
        try:
            return shutil.disk_usage(file.parent).free
        except FileNotFoundError:
            return 0


def temporary_folder_full(content: str) -> StorageFull:
    """Return the error for a temporary folder without room for `content`."""
    return StorageFull(
        f"no room for {content} in the temporary folder {tempfile.gettempdir()}; make room there, or set TMPDIR to a "
        "folder on a larger disk and restart the server"
    )


@contextmanager
def scratch_folder(content: str) -> Iterator[Path]:
    """Make a temporary folder for `content`, and remove it at the end. Raises StorageFull, naming the folder."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    except OSError as cause:
        if cause.errno in NO_ROOM:
            raise temporary_folder_full(content) from cause
        raise
