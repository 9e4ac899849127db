"""The doctor finds what database and store do not share, and registers interventions after the database is lost."""

from __future__ import annotations

import io
import shutil
import uuid
from pathlib import Path

import pytest
from published import BASE, OWNER, make_artifact

from reftserve.interventions import History, load_artifact
from reftserve.server.errors import Conflict, NotFound
from reftserve.server.registry.inspection import inspect_store, rebuild, trashed
from reftserve.server.registry.names import Reference
from reftserve.server.registry.store import Store, open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.tables import Version

LINES = b'{"prompt": "a", "completion": "b"}\n' * 3
HISTORY = History.of_steps([{"step": 1, "train_loss": 0.5, "learning_rate": 0.1}])


def opened(data: Path, *, any_identity: bool = False) -> Store:
    return open_store(Settings(data=data), BASE, any_identity=any_identity)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def publish(store: Store, name: str, number: int, folder: Path) -> Version:
    artifact = make_artifact(folder / f"{name}-{number}", seed=number, history=HISTORY)
    version = store.interventions.publish(OWNER, name, artifact)
    assert version.id == f"{name}@{number}"
    return version.row


def test_an_intact_store_has_no_faults(tmp_path: Path) -> None:
    store = opened(tmp_path)
    publish(store, "tone", 1, tmp_path)
    store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
    assert list(inspect_store(store)) == []


def test_orphans_missing_and_damaged_contents_are_found(tmp_path: Path) -> None:
    store = opened(tmp_path)
    publish(store, "whole", 1, tmp_path)
    missing, damaged = publish(store, "missing", 1, tmp_path), publish(store, "damaged", 1, tmp_path)
    lost, flipped = (store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES)) for _ in range(2))
    blobs = tmp_path / "blobs"
    shutil.rmtree(blobs / missing.blob_key)
    flip(blobs / damaged.blob_key / "edits.safetensors")
    (blobs / lost.blob_key).unlink()
    flip(blobs / flipped.blob_key)
    (blobs / "files" / "left").write_bytes(LINES)
    faults = sorted(inspect_store(store))
    assert [fault.split(":")[0] for fault in faults] == ["damaged", "damaged", "missing", "missing", "orphan"]
    together = "\n".join(faults)
    for word in ("damaged@1", "missing@1", lost.id, flipped.id, "files/left", flipped.sha256):
        assert word in together
    assert "whole@1" not in together


def test_a_lost_database_is_rebuilt_with_names_versions_and_latest(tmp_path: Path) -> None:
    store = opened(tmp_path)
    for number in (1, 2, 3):
        publish(store, "tone", number, tmp_path)
    publish(store, "mood", 1, tmp_path)
    store.interventions.delete(OWNER, "tone", 2)
    before = {text: store.interventions.find(OWNER, Reference.parse(text)).row for text in ("tone@1", "tone", "mood")}
    store.database.close()
    for file in tmp_path.glob("reftserve.db*"):
        file.unlink()
    with pytest.raises(Conflict, match="--rebuild"):
        opened(tmp_path)
    store = opened(tmp_path, any_identity=True)
    lines = list(rebuild(store, BASE, owner="unused", override=False))
    assert [line.split(" from ")[0] for line in lines[1:]] == [
        "registered mood@1",
        "registered tone@1",
        "registered tone@3",
    ]
    for text, row in before.items():
        found = store.interventions.resolve(OWNER, Reference.parse(text))
        for column in ("version", "content_hash", "bytes", "parameters", "manifest", "file_hashes", "blob_key"):
            assert getattr(found.row, column) == getattr(row, column)
        assert found.row.created_at == row.created_at
    assert list(inspect_store(store)) == []
    assert list(rebuild(store, BASE, owner="unused", override=False))[1:] == [], "a second time there is nothing to do"
    store = opened(tmp_path)
    publish(store, "tone", 4, tmp_path)


def test_what_has_no_registration_is_recovered_by_its_hash_and_what_is_no_artifact_is_left(tmp_path: Path) -> None:
    store = opened(tmp_path)
    folder = make_artifact(tmp_path / "artifact")
    digest = load_artifact(folder).content_hash
    other = make_artifact(tmp_path / "other", base=BASE.model_copy(update={"hidden_size": 32}))
    stored = tmp_path / "blobs" / "interventions"
    for source, key in ((folder, "old"), (other, "foreign"), (folder, "broken")):
        shutil.copytree(source, stored / key)
    flip(stored / "broken" / "edits.safetensors")
    lines = list(rebuild(store, BASE, owner=OWNER, override=False))
    assert f"registered recovered-{digest[:8]}@1 from interventions/old" in lines
    assert [line.split(":")[0] for line in lines if line.startswith("left")] == [
        "left interventions/broken",
        "left interventions/foreign",
    ]
    assert store.interventions.resolve(OWNER, Reference.parse(f"recovered-{digest[:8]}")).row.content_hash == digest


def test_the_trash_is_listed(tmp_path: Path) -> None:
    left = tmp_path / "blobs" / "trash" / "1000" / "files" / "left"
    left.parent.mkdir(parents=True)
    left.write_bytes(LINES)
    assert trashed(opened(tmp_path)) == ["trash/1000/files/left"]


@pytest.mark.parametrize("name", ["edits.safetensors", "manifest.json", "history.json"])
def test_a_damaged_artifact_is_not_handed_out_and_the_error_names_both_hashes(tmp_path: Path, name: str) -> None:
    store = opened(tmp_path)
    row = publish(store, "tone", 1, tmp_path)
    reference = Reference.parse("tone")
    assert store.interventions.download(OWNER, reference)
    flip(tmp_path / "blobs" / row.blob_key / name)
    expected = (row.file_hashes or {})[name]
    with pytest.raises(NotFound, match=f"{name} has SHA-256 [0-9a-f]{{64}}; expected {expected}") as refused:
        store.interventions.download(OWNER, reference)
    assert refused.value.code == "intervention_content_damaged"
    if name == "history.json":
        with pytest.raises(NotFound, match="damaged"):
            store.interventions.history(OWNER, reference)


def test_a_damaged_local_copy_of_an_intact_remote_blob_is_fetched_again(tmp_path: Path) -> None:
    store = open_store(Settings(data=tmp_path, blob_url=f"memory://{uuid.uuid4().hex}"), BASE)
    row = publish(store, "tone", 1, tmp_path)
    file = store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(LINES))
    reference = Reference.parse("tone")
    whole = store.interventions.download(OWNER, reference)
    flip(store.blobs.local_folder(row.blob_key) / "edits.safetensors")
    flip(store.files.path(file))
    assert store.interventions.download(OWNER, reference) == whole
    assert store.files.path(file).read_bytes() == LINES


def test_a_damaged_artifact_of_an_older_release_is_not_handed_out(tmp_path: Path) -> None:
    store = opened(tmp_path)
    row = publish(store, "tone", 1, tmp_path)
    with store.database.session() as session:
        session.get_one(Version, row.id).file_hashes = None
    assert store.interventions.download(OWNER, Reference.parse("tone"))
    flip(tmp_path / "blobs" / row.blob_key / "edits.safetensors")
    with pytest.raises(NotFound, match="content_hash is"):
        store.interventions.download(OWNER, Reference.parse("tone"))


def test_a_missing_artifact_is_not_found_and_can_be_deleted(tmp_path: Path) -> None:
    store = opened(tmp_path)
    row = publish(store, "tone", 1, tmp_path)
    shutil.rmtree(tmp_path / "blobs" / row.blob_key)
    for use in (store.interventions.download, store.interventions.history, store.interventions.resolve):
        with pytest.raises(NotFound, match="no longer in the store") as refused:
            use(OWNER, Reference.parse("tone"))
        assert refused.value.code == "intervention_content_missing"
    assert store.interventions.find(OWNER, Reference.parse("tone")).id == "tone@1"
    assert store.interventions.delete(OWNER, "tone") == ["tone@1"]
