"""Blobs: files and folders stored under keys, in a local folder or behind any fsspec URL (s3://, gs://, ...).

A key is written once and never holds part of a file. A blob is reachable once the database commits a row with its key.
Blobs that no row names are moved below `trash/<Unix seconds>/` before they go for good.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy.exc import DBAPIError

from reftserve.server.errors import StorageFull
from reftserve.server.storage.blob_cache import BlobCache
from reftserve.server.storage.pins import Pins
from reftserve.server.storage.reserve import NO_ROOM, Reserve

logger = logging.getLogger(__name__)
TRASH = "trash"


class BlobStore:
    """Blobs below one URL.

    cache: local folder for copies of remote blobs, of at most `cache_bytes`. reserve: must be whole to store a blob.
    """

    def __init__(self, url: str, cache: Path, *, cache_bytes: int = 16 << 30, reserve: Reserve | None = None) -> None:
        self.filesystem: Any
        self.filesystem, self.root = fsspec.core.url_to_fs(url)
        self.is_local = isinstance(self.filesystem, LocalFileSystem)
        self.pins = Pins()
        self._cache = BlobCache(cache, cache_bytes, lambda key: self.pins.count(key) > 0)
        self._reserve = reserve
        self._deletions = ThreadPoolExecutor(1, thread_name_prefix="blob-deletions")

    def put_file(self, key: str, source: Path) -> None:
        """Store a local file. Raises StorageFull when the disk is full; nothing stays under the key."""
        with self._all_or_nothing(key):
            self._copy(source, self._path(key))
            self._sync_folders(key)

    def put_folder(self, key: str, source: Path, more: Mapping[str, bytes] | None = None) -> None:
        """Store a folder's files, without subfolders, and `more` files. Raises StorageFull; then nothing stays."""
        with self._all_or_nothing(key):
            for file in sorted(source.iterdir()):
                self._copy(file, f"{self._path(key)}/{file.name}")
            for name, content in (more or {}).items():
                self._write(content, f"{self._path(key)}/{name}")
            self._sync_folders(f"{key}/-")

    def put_bytes(self, key: str, content: bytes) -> None:
        """Store or replace a small file. Raises StorageFull."""
        with map_enospc(key):
            self._write(content, self._path(key))
            self._sync_folders(key)
            if self.is_local:
                _sync(Path(self.root).parent)  # the store's own name, when this is its first file

    def read_bytes(self, key: str) -> bytes | None:
        """Return a small file, or None if there is none."""
        self.filesystem.invalidate_cache()
        try:
            content: bytes = self.filesystem.cat_file(self._path(key))
        except FileNotFoundError:
            return None
        return content

    def local_path(self, key: str) -> Path:
        """Return where `local_file` or `local_folder` puts a blob, without looking."""
        return Path(self._path(key)) if self.is_local else self._cache.path(key)

    def local_file(self, key: str) -> Path:
        """Return a local path to a stored file; a remote file is copied into the cache. Raises FileNotFoundError."""
        return self._local(key)

    def local_folder(self, key: str) -> Path:
        """Return a local path to a stored folder; a remote one is copied into the cache. Raises FileNotFoundError."""
        return self._local(key)

    def drop_copy(self, key: str) -> bool:
        """Remove the local copy of a remote blob, so that it is fetched again. Return False if the store is local."""
        if not self.is_local:
            self._cache.remove(key)
        return not self.is_local

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
        if self.exists(key):
            self.filesystem.rm(self._path(key), recursive=True)
        if not self.is_local:
            self._cache.remove(key)

    def discard(self, key: str) -> None:
        """Delete a blob whose row is gone. An error only leaves it to the next start's sweep."""
        try:
            self.delete(key)
        except OSError:
            logger.exception("could not delete %s; the sweep of a later start will", key)

    def unpin(self, key: str) -> None:
        """Undo one pin. A blob that was deleted meanwhile is removed by a thread, because an event loop may call."""
        if self.pins.remove(key):
            self._deletions.submit(self.discard, key)

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
        """Move blobs below `prefix` that are not in `keep` to the trash; return their keys.

        Blobs from before `since` (Unix seconds) stay, and so do young ones: a row may follow.
        """
        swept = []
        for key in self.children(prefix):
            # A file that was listed may have been renamed or deleted since.
            with suppress(FileNotFoundError):
                if key not in keep and since <= self._modified(self._path(key)) < time.time() - older_than_s:
                    self._move_to_trash(key)
                    swept.append(key)
        return swept

    def empty_trash(self, *, older_than_s: float) -> list[str]:
        """Delete what has been in the trash longer than `older_than_s`; return the deleted keys."""
        expired = []
        for key in self.children(TRASH):
            moment = key.rsplit("/", 1)[-1]
            if moment.isdecimal() and int(moment) <= time.time() - older_than_s:
                self.delete(key)
                expired.append(key)
        return expired

    def _move_to_trash(self, key: str) -> None:
        target = f"{TRASH}/{int(time.time())}/{key}"
        if self.is_local:
            Path(self._path(target)).parent.mkdir(parents=True, exist_ok=True)
            Path(self._path(key)).rename(self._path(target))
        else:
            self.filesystem.mv(self._path(key), self._path(target), recursive=True)
        logger.info("moved %s, which no row of the database names, to %s in %s", key, target, self.root)

    def _modified(self, path: str) -> float:
        if self.is_local:
            return Path(path).stat().st_mtime
        newest = [self.filesystem.modified(file).timestamp() for file in self.filesystem.find(path)]
        return max(newest, default=0.0)

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _local(self, key: str) -> Path:
        path = self._path(key)
        if self.is_local:
            Path(path).stat()
            return Path(path)
        return self._cache.get(key, lambda target: self.filesystem.get(path, target, recursive=True))

    def _copy(self, source: Path, target: str) -> None:
        if self.is_local:
            with source.open("rb") as read, _atomic(Path(target)) as write:
                shutil.copyfileobj(read, write)
        else:
            self.filesystem.put_file(str(source), target)

    def _write(self, content: bytes, target: str) -> None:
        if self.is_local:
            with _atomic(Path(target)) as write:
                write.write(content)
        else:
            self.filesystem.pipe_file(target, content)

    def _sync_folders(self, key: str) -> None:
        """Sync the folders above a local key: a file is durable once its name is."""
        if self.is_local:
            root = Path(self.root)
            for folder in Path(self._path(key)).parents:
                _sync(folder)
                if folder == root:
                    break

    @contextmanager
    def _all_or_nothing(self, key: str) -> Iterator[None]:
        try:
            if self._reserve is not None:
                self._reserve.require()
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


@contextmanager
def _atomic(target: Path) -> Iterator[BinaryIO]:
    """Open a file that appears under its name when it is complete and on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
    try:
        with scratch.open("wb") as write:
            yield write
            write.flush()
            os.fsync(write.fileno())
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
