"""Files are stored only if valid, within a quota, and are removed whole."""

from __future__ import annotations

import errno
import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from published import OWNER

from reftserve.server.datasets.file_store import FileStore
from reftserve.server.errors import InvalidRequest, NotFound, PayloadTooLarge, QuotaExceeded, StorageFull
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.database import Database

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    database = Database(f"sqlite:///{tmp_path / 'test.db'}")
    database.migrate()
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    return FileStore(database, blobs, max_bytes=200, max_owner_bytes=5 * len(LINES))


def upload(files: FileStore, content: bytes, purpose: str = "fine-tune") -> str:
    return files.upload(OWNER, "set.jsonl", purpose, io.BytesIO(content)).id


def test_a_valid_file_is_kept_byte_for_byte(files: FileStore) -> None:
    row = files.get(OWNER, upload(files, LINES))
    assert files.path(row).read_bytes() == LINES
    assert (row.bytes, row.examples, row.filename) == (len(LINES), 3, "set.jsonl")
    assert listed(files) == [row.id]
    assert files.list_page("somebody else") == ([], False)
    with pytest.raises(NotFound):
        files.get("somebody else", row.id)


def listed(files: FileStore, **options: Any) -> list[str]:
    rows, _ = files.list_page(OWNER, **options)
    return [row.id for row in rows]


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"", InvalidRequest, "no examples|empty"),
        (b"\n \n", InvalidRequest, "no examples|empty"),
        (LINES + b"{", InvalidRequest, "line 4"),
        (LINES + b'{"prompt": "a"}', InvalidRequest, "line 4.*completion"),
        (b'{"prompt": "\xff", "completion": "b"}', InvalidRequest, "not UTF-8"),
        (LINES * 10, PayloadTooLarge, "more than 200 bytes"),
    ],
)
def test_a_bad_file_is_refused_and_leaves_nothing(
    files: FileStore, tmp_path: Path, content: bytes, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        upload(files, content)
    assert listed(files) == []
    assert not (tmp_path / "blobs").exists()


def test_concurrent_uploads_share_one_quota(database_url: str, tmp_path: Path) -> None:
    database = Database(database_url)
    database.migrate()
    room = {"max_bytes": 200, "max_owner_bytes": 2 * len(LINES)}
    blobs = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    stores = [FileStore(database, blobs, **room) for _ in range(8)]
    together = Barrier(len(stores))

    def attempt(files: FileStore) -> bool:
        together.wait()
        try:
            upload(files, LINES)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(len(stores)) as pool:
        assert sum(pool.map(attempt, stores)) == 2
    assert len(listed(stores[0])) == 2


def test_uploads_fill_a_quota_that_deletion_frees_and_results_do_not_use(files: FileStore, tmp_path: Path) -> None:
    kept = [upload(files, LINES) for _ in range(5)]
    with pytest.raises(QuotaExceeded, match="delete files first") as refused:
        upload(files, LINES)
    assert (refused.value.status, refused.value.code, refused.value.param) == (413, "storage_quota_exceeded", "file")
    assert len(list((tmp_path / "blobs" / "files").iterdir())) == 5, "nothing half-written"
    files.put_result(OWNER, "ftjob-1", "job.csv", b"step\n")
    assert files.upload("somebody else", "set.jsonl", "fine-tune", io.BytesIO(LINES)).bytes == len(LINES)
    files.delete(OWNER, kept[0])
    upload(files, LINES)


def test_a_full_disk_leaves_nothing_of_an_upload(
    files: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFull):
            upload(files, LINES)
    assert listed(files) == []
    assert list((tmp_path / "blobs" / "files").iterdir()) == []
    assert upload(files, LINES)


def test_bytes_without_a_row_after_a_crash_are_swept(files: FileStore, tmp_path: Path) -> None:
    kept = files.path(files.get(OWNER, upload(files, LINES)))
    left = kept.with_name("left")
    left.write_bytes(LINES)
    os.utime(left, (0, 0))
    os.utime(kept, (0, 0))
    assert files.sweep() == ["files/left"]
    assert kept.exists()


def test_an_unknown_purpose_is_refused_by_name(files: FileStore) -> None:
    with pytest.raises(InvalidRequest, match="'assistants'"):
        upload(files, LINES, "assistants")


def test_results_are_listed_by_their_purpose_and_deleted_whole(files: FileStore, tmp_path: Path) -> None:
    upload(files, LINES)
    for content in (b"step\n", b"step\n1\n"):
        result = files.put_result(OWNER, "ftjob-1", "job.csv", content)
    assert files.path(result).read_bytes() == b"step\n1\n"
    assert listed(files, purpose="fine-tune-results") == [result.id]
    files.delete(OWNER, result.id)
    with pytest.raises(NotFound):
        files.delete(OWNER, result.id)
    assert len(list((tmp_path / "blobs" / "files").iterdir())) == 1
