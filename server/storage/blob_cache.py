"""Local copies of remote blobs. The least recently used ones go when the folder exceeds its size."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)
IN_USE_S = 3600.0


class BlobCache:
    """Copies by key in a folder of at most `max_bytes`. is_pinned: says whether a key's copy is in use.

    Processes share the folder, so a copy's time of use is the modification time of its file or folder. Copies that were
    used within IN_USE_S stay even above `max_bytes`: another process may read them.
    """

    def __init__(self, folder: Path, max_bytes: int, is_pinned: Callable[[str], bool]) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._is_pinned = is_pinned

    def path(self, key: str) -> Path:
        """Return the path of a copy, whether it is there or not."""
        return self._folder / key

    def get(self, key: str, fetch: Callable[[str], object]) -> Path:
        """Return the copy of a blob. fetch: writes a missing one to a path."""
        copy = self.path(key)
        try:
            os.utime(copy)
            os.utime(self._unit(copy))
        except FileNotFoundError:
            self._add(copy, fetch)
        return copy

    def remove(self, key: str) -> None:
        """Remove a copy; a missing one is no error."""
        if self.path(key).exists():
            with self._lock():
                _remove(self.path(key))

    def _add(self, copy: Path, fetch: Callable[[str], object]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".partial-") as scratch:
            fetched = Path(scratch, "copy")
            fetch(str(fetched))
            with self._lock():
                # Another thread or process may have made the same copy first.
                if not copy.exists():
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    fetched.rename(copy)
                os.utime(copy)
                os.utime(self._unit(copy))
                self._shrink()

    def _shrink(self) -> None:
        units = sorted(self._folder.glob("[!.]*/*"), key=lambda unit: unit.stat().st_mtime)
        sizes = {unit: _size(unit) for unit in units}
        total = sum(sizes.values())
        for unit, size in sizes.items():
            if total <= self._max_bytes:
                return
            key = unit.relative_to(self._folder).as_posix()
            if unit.stat().st_mtime < time.time() - IN_USE_S and not self._is_pinned(key):
                _remove(unit)
                total -= size
                logger.info("removed the local copy of %s, the least recently used", key)

    def _unit(self, copy: Path) -> Path:
        """Return what is removed at once: a file's copy, an artifact's, or all copies of a job."""
        return self._folder.joinpath(*copy.relative_to(self._folder).parts[:2])

    def _lock(self) -> FileLock:
        return FileLock(self._folder / ".lock")


def _remove(copy: Path) -> None:
    if copy.is_dir():
        shutil.rmtree(copy)
    else:
        copy.unlink(missing_ok=True)


def _size(copy: Path) -> int:
    files = copy.rglob("*") if copy.is_dir() else [copy]
    return sum(file.stat().st_size for file in files if file.is_file())
