"""Blobs: files and folders stored under keys, in a local folder or behind any fsspec URL (s3://, gs://, ...).

A key is written once and never holds part of a file. A blob is reachable once the database commits a row with its key.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy.exc import DBAPIError

from reftserve.server.errors import StorageFull

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BlobStore:
    """Blobs below one URL. cache: local folder for copies of remote blobs."""

    def __init__(self, url: str, cache: Path) -> None:
        self.filesystem: Any
        self.filesystem, self.root = fsspec.core.url_to_fs(url)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.cache = cache

    def put_file(self, key: str, source: Path) -> None:
        """Store a local file. Raises StorageFull when the disk is full; nothing stays under the key."""
        with self._all_or_nothing(key):
            self._copy(source, self._path(key))

    def put_folder(self, key: str, source: Path) -> None:
        """Store a folder's files, without subfolders. Raises StorageFull; nothing then stays under the key."""
        with self._all_or_nothing(key):
            for file in sorted(source.iterdir()):
                self._copy(file, f"{self._path(key)}/{file.name}")

    def open(self, key: str) -> BinaryIO:
        """Open a stored file for reading."""
        stream: BinaryIO = self.filesystem.open(self._path(key), "rb")
        return stream

    def local_file(self, key: str) -> Path:
        """Return a local path to a stored file; a remote file is copied into the cache once."""
        return self._local(key)

    def local_folder(self, key: str) -> Path:
        """Return a local path to a stored folder; a remote folder is copied into the cache once."""
        return self._local(key)

    def exists(self, key: str) -> bool:
        """Say whether a file or folder is stored under the key."""
        # Other processes write too, so the listing that fsspec has cached may be out of date.
        self.filesystem.invalidate_cache()
        return bool(self.filesystem.exists(self._path(key)))

    def children(self, prefix: str) -> list[str]:
        """List the keys directly below `prefix`, sorted."""
        if not self.exists(prefix):
            return []
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in self.filesystem.ls(self._path(prefix), detail=False)]
        return sorted(f"{prefix}/{name}" for name in names)

    def size(self, prefix: str) -> int:
        """Sum the bytes stored below `prefix`."""
        self.filesystem.invalidate_cache()
        return sum(info["size"] for info in self.filesystem.find(self._path(prefix), detail=True).values())

    def delete(self, key: str) -> None:
        """Delete a file or folder; a missing one is no error."""
        if self.filesystem.exists(self._path(key)):
            self.filesystem.rm(self._path(key), recursive=True)
        if not self.is_local:
            shutil.rmtree(self.cache / key, ignore_errors=True)

    @contextmanager
    def delete_blob_on_error(self, key: str) -> Iterator[None]:
        """Delete the blob if its transaction raises, but not after a database error: the row may be committed."""
        try:
            yield
        except DBAPIError:
            raise
        except Exception:
            self.delete(key)
            raise

    def sweep(self, prefix: str, keep: set[str], *, since: float = 0.0, older_than_s: float = 3600) -> list[str]:
        """Delete blobs below `prefix`, from `since` on, that are not in `keep`. Young ones stay: a row may follow."""
        swept = []
        for key in self.children(prefix):
            if key not in keep and since <= self._modified(self._path(key)) < time.time() - older_than_s:
                self.delete(key)
                swept.append(key)
        return swept

    def _modified(self, path: str) -> float:
        if self.is_local:
            return Path(path).stat().st_mtime
        newest = [self.filesystem.modified(file).timestamp() for file in self.filesystem.find(path)]
        return max(newest, default=0.0)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _local(self, key: str) -> Path:
        if self.is_local:
            return Path(self._path(key))
        copy = self.cache / key
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=copy.parent) as scratch:
                self.filesystem.get(self._path(key), f"{scratch}/copy", recursive=True)
                # Another thread may have made the same copy first.
                if not copy.exists():
                    Path(scratch, "copy").rename(copy)
        return copy

    def _copy(self, source: Path, target: str) -> None:
        if not self.is_local:
            self.filesystem.put_file(str(source), target)
            return
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(f"{target}.{uuid.uuid4().hex}.partial")
        try:
            with source.open("rb") as read, scratch.open("wb") as write:
                shutil.copyfileobj(read, write)
                write.flush()
                os.fsync(write.fileno())
            scratch.replace(target)
        finally:
            scratch.unlink(missing_ok=True)

    @contextmanager
    def _all_or_nothing(self, key: str) -> Iterator[None]:
        try:
            with map_enospc(key):
                yield
        except (OSError, StorageFull):
            self.delete(key)
            raise


@contextmanager
def map_enospc(content: str) -> Iterator[None]:
    """Raise StorageFull in place of the system's errors for a full disk. content: its name in the message."""
    try:
        yield
    except OSError as cause:
        if cause.errno in NO_ROOM:
            raise StorageFull(f"no room to store {content}; nothing was stored") from cause
        raise
