"""The reserve: threads make it together, and its own troubles end no transaction that has been committed."""

from __future__ import annotations

import errno
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from reftserve.server.errors import Unavailable
from reftserve.server.storage import reserve as reserve_module
from reftserve.server.storage.database import Database
from reftserve.server.storage.reserve import Reserve

SIZE = 1 << 16


def test_threads_that_make_the_reserve_at_once_leave_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "reserve"
    reserve = Reserve(file, SIZE)
    both, sync = threading.Barrier(2), reserve_module.os.fsync

    def synced_together(descriptor: int) -> None:
        sync(descriptor)
        # A thread that makes the reserve alone goes on after a while.
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)

    monkeypatch.setattr(reserve_module.os, "fsync", synced_together)
    with ThreadPoolExecutor(2) as threads:
        for made in [threads.submit(reserve.require) for _ in range(2)]:
            made.result()
    assert file.stat().st_blocks * 512 >= SIZE, "a sparse file keeps nothing back"
    assert list(tmp_path.iterdir()) == [file]


def test_a_reserve_that_cannot_be_made_again_fails_no_deletion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> NoReturn:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(Reserve, "_make", broken)
    with caplog.at_level(logging.WARNING), Reserve(tmp_path / "reserve", SIZE).lent():
        pass
    assert "could not be made: [Errno 5] the disk is broken" in caplog.text


def test_a_database_in_a_missing_folder_is_unavailable(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'x.db'}", reserve_bytes=SIZE)
    with pytest.raises(Unavailable, match="unable to open database file"):
        database.migrate()
