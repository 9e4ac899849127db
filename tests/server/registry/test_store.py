"""The sweep at start-up removes blobs without rows, but never blobs that another database may reference."""

from __future__ import annotations

import io
import logging
import os
import time
from pathlib import Path

import pytest
from published import BASE, OWNER, make_artifact

from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


def opened(data: Path) -> Store:
    return open_store(Settings(data=data), BASE)


def stored(data: Path) -> set[Path]:
    """Return the store's files, after setting their age to a day."""
    found = {path for path in (data / "blobs").rglob("*") if path.is_file()}
    for path in (data / "blobs").rglob("*"):
        os.utime(path, (time.time() - 86400,) * 2)
    return found


def filled(data: Path) -> set[Path]:
    store = opened(data)
    for number in range(2):
        store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
        store.interventions.publish(OWNER, "tone", make_artifact(data / f"artifact-{number}"))
    store.database.close()
    return stored(data)


def lose_database(data: Path) -> None:
    for file in data.glob("reftserve.db*"):
        file.unlink()


def test_a_lost_database_costs_no_blob_and_the_log_advises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = filled(tmp_path)
    lose_database(tmp_path)
    store = opened(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert store.sweep() == []
    assert stored(tmp_path) == before
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "4 files and artifacts" in warning
    assert "Restore the database" in warning
    assert str(tmp_path / "blobs") in warning


def test_blobs_of_a_lost_database_stay_when_the_new_one_has_rows(tmp_path: Path) -> None:
    before = filled(tmp_path)
    lose_database(tmp_path)
    opened(tmp_path).files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
    assert opened(tmp_path).sweep() == []
    assert before < stored(tmp_path)


def test_blobs_without_a_row_after_a_crash_are_swept(tmp_path: Path) -> None:
    filled(tmp_path)
    store = opened(tmp_path)
    with store.database.session() as session:
        for row in store.files.list_all(OWNER):
            row.created_at -= 86400
            session.merge(row)
    left = [tmp_path / "blobs" / kind / "left" for kind in ("files", "interventions")]
    for path in left:
        path.write_bytes(LINES)
        os.utime(path, (time.time() - 7200,) * 2)
    assert sorted(store.sweep()) == ["files/left", "interventions/left"]
    assert not any(path.exists() for path in left)


def test_a_new_data_folder_gives_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert opened(tmp_path).sweep() == []
    assert not caplog.records
