"""A store and its database know each other; what no row names goes to a trash, never what another database may list."""

from __future__ import annotations

import io
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from published import BASE, OWNER, make_artifact
from sqlalchemy import update

from reftserve.server.errors import Conflict, Unavailable
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.store_identity import IDENTITY_KEY
from reftserve.server.storage.tables import File

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3


def opened(data: Path, **settings: str) -> Store:
    return open_store(Settings.model_validate({"data": data, **settings}), BASE)


def stored(data: Path) -> set[Path]:
    """Return the store's blobs, after setting their age to a day."""
    for path in (data / "blobs").rglob("*"):
        os.utime(path, (time.time() - 86400,) * 2)
    return {path for kind in ("files", "interventions") for path in (data / "blobs" / kind).rglob("*")}


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


def empty_database(data: Path) -> None:
    lose_database(data)
    (data / "reftserve.db").touch()


def make_rows_older(store: Store) -> None:
    with store.database.session() as session:
        session.execute(update(File).values(created_at=File.created_at - 2 * 86400))


def leave_orphans(data: Path) -> list[Path]:
    left = [data / "blobs" / kind / "left" for kind in ("files", "interventions")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(LINES)
        os.utime(path, (time.time() - 7200,) * 2)
    return left


@pytest.mark.parametrize("lose", [lose_database, empty_database])
def test_a_lost_or_empty_database_is_refused_before_it_costs_a_blob(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    before = filled(tmp_path)
    lose(tmp_path)
    with pytest.raises(Conflict, match=r"belongs to .*reftserve doctor --store --rebuild") as refused:
        opened(tmp_path)
    assert str(tmp_path / "blobs") in refused.value.message
    assert stored(tmp_path) == before


def test_two_databases_cannot_share_a_store(tmp_path: Path) -> None:
    before = filled(tmp_path)
    with pytest.raises(Conflict, match="set database_url"):
        opened(tmp_path / "other", blob_url=str(tmp_path / "blobs"))
    assert stored(tmp_path) == before
    assert opened(tmp_path).interventions.get(OWNER, "tone").versions == [1, 2]


def test_a_store_of_an_older_release_gets_the_id_of_the_first_database_with_rows(tmp_path: Path) -> None:
    filled(tmp_path)
    (tmp_path / "blobs" / IDENTITY_KEY).unlink()
    with pytest.raises(Conflict, match="does not list"):
        opened(tmp_path / "empty", blob_url=str(tmp_path / "blobs"))
    assert opened(tmp_path).interventions.get(OWNER, "tone").versions == [1, 2]
    assert (tmp_path / "blobs" / IDENTITY_KEY).is_file()


def test_an_empty_store_follows_a_new_database(tmp_path: Path) -> None:
    opened(tmp_path).database.close()
    lose_database(tmp_path)
    assert opened(tmp_path).files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))


def test_an_old_backup_of_the_database_moves_what_it_does_not_list_to_the_trash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened(tmp_path)
    store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
    make_rows_older(store)
    store.database.close()
    shutil.copy(tmp_path / "reftserve.db", tmp_path / "backup")
    store = opened(tmp_path)
    store.interventions.publish(OWNER, "tone", make_artifact(tmp_path / "artifact"))
    store.database.close()
    lose_database(tmp_path)
    shutil.copy(tmp_path / "backup", tmp_path / "reftserve.db")
    stored(tmp_path)
    with caplog.at_level(logging.INFO, logger="reftserve"):
        (key,) = opened(tmp_path).sweep()
    (line,) = [record.getMessage() for record in caplog.records if "moved" in record.getMessage()]
    assert key in line
    (moment,) = (tmp_path / "blobs" / "trash").iterdir()
    assert (moment / key / "manifest.json").is_file()


def test_blobs_without_a_row_after_a_crash_stay_in_the_trash_for_a_week(tmp_path: Path) -> None:
    filled(tmp_path)
    store = opened(tmp_path)
    make_rows_older(store)
    left = leave_orphans(tmp_path)
    assert sorted(store.sweep()) == ["files/left", "interventions/left"]
    assert not any(path.exists() for path in left)
    assert store.sweep() == []
    trash = tmp_path / "blobs" / "trash"
    assert [path.read_bytes() for path in trash.rglob("left")] == [LINES] * 2
    for moment in list(trash.iterdir()):
        moment.rename(moment.with_name(str(int(moment.name) - 8 * 86400)))
    store.sweep()
    assert list(trash.iterdir()) == []


def test_a_store_that_was_given_to_another_database_meanwhile_is_not_swept(tmp_path: Path) -> None:
    filled(tmp_path)
    store = opened(tmp_path)
    make_rows_older(store)
    left = leave_orphans(tmp_path)
    (tmp_path / "blobs" / IDENTITY_KEY).write_text('{"database": "another"}')
    assert store.sweep() == []
    assert all(path.exists() for path in left)


def test_without_rows_nothing_is_swept(tmp_path: Path) -> None:
    store = opened(tmp_path)
    left = leave_orphans(tmp_path)
    assert store.sweep() == []
    assert all(path.exists() for path in left)


def test_a_damaged_database_is_one_sentence_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "reftserve.db").write_bytes(b"no database" * 1000)
    with pytest.raises(Unavailable, match="cannot be used: file is not a database; mend or restore it"):
        opened(tmp_path)
