"""Blobs: durable names, a bounded cache of remote ones, and pins that keep what is in use."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path

import pytest

from reftserve.server.storage import blobs as blobs_module
from reftserve.server.storage.blob_cache import BlobCache
from reftserve.server.storage.blobs import BlobStore
from reftserve.server.storage.pins import Pins


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "part").write_bytes(bytes(1000))
    return folder


def remote(tmp_path: Path, cache_bytes: int) -> BlobStore:
    return BlobStore(f"memory://{uuid.uuid4().hex}", tmp_path / "cache", cache_bytes=cache_bytes)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_stored_name_is_synced_as_its_bytes_are(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    synced: list[Path] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    store = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    if kind == "file":
        store.put_file("files/a", source / "part")
        names = ["files"]
    else:
        store.put_folder("files/a", source, {"more": b"more"})
        names = ["files/a", "files"]
    above = [tmp_path / "blobs" / name for name in names] + [tmp_path / "blobs"]
    assert [path for path in synced if path.suffix != ".partial"] == above
    assert sum(path.suffix == ".partial" for path in synced) == (1 if kind == "file" else 2)


def test_the_least_recently_used_copies_go_when_the_cache_is_full(tmp_path: Path, source: Path) -> None:
    store = remote(tmp_path, cache_bytes=3500)
    keys = [f"interventions/{number}" for number in range(5)]
    for key in keys:
        store.put_folder(key, source)
    for moment, key in enumerate(keys[:3]):
        os.utime(store.local_folder(key), (moment, moment))
    assert store.local_folder(keys[0]).is_dir(), "its use makes it the newest"
    for key in keys[3:]:
        assert (store.local_folder(key) / "part").read_bytes() == bytes(1000)
    kept = {f"interventions/{path.name}" for path in (tmp_path / "cache" / "interventions").iterdir()}
    assert kept == {keys[0], keys[3], keys[4]}
    assert (store.local_folder(keys[1]) / "part").read_bytes() == bytes(1000), "it is fetched again"


def test_a_pinned_copy_stays_in_a_full_cache(tmp_path: Path, source: Path) -> None:
    store = remote(tmp_path, cache_bytes=1)
    for number in range(3):
        store.put_folder(f"interventions/{number}", source)
    pinned = store.local_folder("interventions/0")
    assert store.pins.add("interventions/0")
    for copy in (pinned, store.local_folder("interventions/1")):
        os.utime(copy, (0, 0))
    store.local_folder("interventions/2")
    assert sorted(path.name for path in pinned.parent.iterdir()) == ["0", "2"]


def test_a_blob_that_another_process_has_stored_is_deleted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = remote(tmp_path, cache_bytes=1)
    store.put_folder("jobs/1", source)
    is_fresh = threading.Event()
    exists = store.filesystem.exists
    # As a listing does that fsspec has cached before the blob was stored.
    monkeypatch.setattr(store.filesystem, "exists", lambda path: is_fresh.is_set() and exists(path))
    monkeypatch.setattr(store.filesystem, "invalidate_cache", is_fresh.set)
    store.delete("jobs/1")
    assert not store.exists("jobs/1")


def test_a_copy_that_was_used_lately_stays_in_a_full_cache(tmp_path: Path, source: Path) -> None:
    store = remote(tmp_path, cache_bytes=1)
    for number in range(2):
        store.put_folder(f"interventions/{number}", source)
    copies = [store.local_folder(f"interventions/{number}") for number in range(2)]
    assert all((copy / "part").is_file() for copy in copies), "another process may read either"


def test_two_fetchers_of_one_folder_get_the_same_copy(tmp_path: Path) -> None:
    cache = BlobCache(tmp_path / "cache", 1 << 20, lambda key: False)

    def fetch(target: str) -> None:
        Path(target).mkdir()
        Path(target, "part").write_bytes(b"whole")

    def fetch_beside_another(target: str) -> None:
        cache.get("interventions/1", fetch)
        fetch(target)

    assert (cache.get("interventions/1", fetch_beside_another) / "part").read_bytes() == b"whole"


@pytest.mark.parametrize("url", ["", "memory://"])
def test_a_missing_blob_is_file_not_found(tmp_path: Path, url: str) -> None:
    store = BlobStore(url + (uuid.uuid4().hex if url else str(tmp_path / "blobs")), tmp_path / "cache")
    for read in (store.local_file, store.local_folder):
        with pytest.raises(FileNotFoundError):
            read("files/none")
    assert store.read_bytes("none") is None


def test_unpinning_a_deleted_blob_leaves_its_deletion_to_a_thread(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    store.put_file("files/a", source / "part")
    assert store.pins.add("files/a")
    assert store.pins.doom(["files/a"]) == []
    threads: list[threading.Thread] = []
    deleted = threading.Event()

    def delete(self: BlobStore, key: str) -> None:
        threads.append(threading.current_thread())
        deleted.set()

    monkeypatch.setattr(blobs_module.BlobStore, "delete", delete)
    store.unpin("files/a")
    assert deleted.wait(10)
    assert threads != [threading.current_thread()]


def test_a_pin_is_refused_once_its_blob_is_deleted_and_counts_until_then() -> None:
    pins = Pins()
    assert pins.add("a")
    assert pins.add("a")
    assert pins.count("a") == 2
    assert pins.doom(["a", "b"]) == ["b"]
    assert not pins.add("b")
    assert pins.add("a"), "what runs may use more of it"
    assert [pins.remove("a") for _ in range(3)] == [False, False, True]
    assert not pins.add("a")


def test_a_file_that_goes_while_the_store_is_swept_does_not_stop_the_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(str(tmp_path / "blobs"), tmp_path / "cache")
    left = tmp_path / "blobs" / "files" / "left"
    left.parent.mkdir(parents=True)
    left.touch()
    os.utime(left, (0, 0))
    monkeypatch.setattr(BlobStore, "children", lambda *_: ["files/a.partial", "files/left"])
    assert store.sweep("files", set()) == ["files/left"]
