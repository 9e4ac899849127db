"""A full disk: nothing is stored, everything can be deleted, and room that is made can be used."""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from full_disk import can_mount, fill, small_disk
from published import BASE, OWNER, make_artifact

from reftserve.server.errors import StorageFull
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.leases import Leases
from reftserve.server.storage.reserve import Reserve
from reftserve.server.storage.tables import Job

LINES = b'{"prompt": "a", "completion": "b"}\n'
pytestmark = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", 24) as folder:
        yield folder


def opened(disk: Path) -> Store:
    return open_store(Settings(data=disk / "data", reserve_bytes=8 << 20), BASE)


def upload(store: Store, kibibytes: int = 1) -> str:
    content = LINES * (kibibytes * 1024 // len(LINES))
    return store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(content)).id


def upload_until_full(store: Store) -> list[str]:
    kept: list[str] = []
    try:
        while len(kept) < 1000:
            kept.append(upload(store, 512))
    except StorageFull:
        return kept
    raise AssertionError("the disk never fills")


def add_job(store: Store) -> None:
    with store.database.session() as session:
        session.add(
            Job(
                id="ftjob-1",
                status="queued",
                owner=OWNER,
                model="m",
                training_file="f",
                suffix="s",
                plan={},
                seed=0,
                result_files=[],
                created_at=int(time.time()),
            )
        )


def test_uploads_that_fill_a_disk_can_be_deleted_and_then_uploaded_again(disk: Path) -> None:
    store = opened(disk)
    kept = upload_until_full(store)
    fill(disk)
    for file_id in kept:
        store.files.delete(OWNER, file_id)
    (disk / "filler").unlink()
    upload(store, 512)


def test_files_versions_aliases_and_leases_end_with_no_byte_left_and_nothing_new_begins(
    disk: Path, tmp_path: Path
) -> None:
    store = opened(disk)
    artifact = make_artifact(tmp_path / "artifact")
    for _ in range(3):
        store.interventions.publish(OWNER, "tone", artifact)
    store.interventions.set_alias(OWNER, "tone", "stable", 1)
    kept = [upload(store) for _ in range(3)]
    add_job(store)
    leases = Leases(store.database, Job, "worker", lease_s=60)
    assert leases.take() is not None
    fill(disk)
    for _ in range(50):  # renewals must not use the reserve up
        leases.renew()
        with pytest.raises(StorageFull):
            upload(store)
        with pytest.raises(StorageFull):
            store.interventions.publish(OWNER, "tone", artifact)
        with pytest.raises(StorageFull):
            store.interventions.set_alias(OWNER, "tone", "late", 2)
    leases.release()
    store.interventions.delete_alias(OWNER, "tone", "stable")
    assert store.interventions.delete(OWNER, "tone", 1) == ["tone@1"]
    assert store.interventions.delete(OWNER, "tone") == ["tone@2", "tone@3"]
    for file_id in kept:
        store.files.delete(OWNER, file_id)
    assert store.files.list_page(OWNER) == ([], False)
    (disk / "filler").unlink()
    assert upload(store)
    assert store.interventions.publish(OWNER, "tone", artifact).id == "tone@4"


def test_a_store_opens_on_a_full_disk_and_can_be_emptied(disk: Path) -> None:
    store = opened(disk)
    kept = [upload(store) for _ in range(2)]
    store.database.close()
    fill(disk)
    store = opened(disk)
    for file_id in kept:
        store.files.delete(OWNER, file_id)
    assert store.files.list_page(OWNER) == ([], False)


def test_a_reserve_is_given_up_when_the_disk_is_nearly_full_and_made_again_with_room(disk: Path) -> None:
    file = disk / "reserve"
    reserve = Reserve(file, 4 << 20)
    reserve.require()
    assert file.stat().st_blocks * 512 >= 4 << 20, "its space is really taken"
    with reserve.lent():
        assert file.exists(), "there is room without it"
    fill(disk)
    with reserve.lent():
        assert not file.exists()
        assert shutil.disk_usage(disk).free >= 4 << 20
    with pytest.raises(StorageFull, match="Delete files"):
        reserve.require()
    (disk / "filler").unlink()
    reserve.require()
    assert file.stat().st_size == 4 << 20
