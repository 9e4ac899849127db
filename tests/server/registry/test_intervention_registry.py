"""The registry: immutable versions, aliases, holds, and no half-published version after any failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import published
import pytest
from published import BASE, OWNER, make_artifact, open_registry

from reftserve.interventions import load_artifact, unpack
from reftserve.server.errors import Conflict, InvalidRequest, NotFound, QuotaExceeded
from reftserve.server.registry.intervention_registry import InterventionRegistry
from reftserve.server.registry.names import Reference


@pytest.fixture
def registry(tmp_path: Path) -> InterventionRegistry:
    return open_registry(tmp_path)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "artifact")


def resolve(registry: InterventionRegistry, text: str) -> str:
    return registry.resolve(OWNER, Reference.parse(text)).id


def names(registry: InterventionRegistry) -> list[str]:
    rows, _ = registry.list_page(OWNER)
    return [row.name for row in rows]


def await_that(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process(what: str, folder: Path, artifact: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, published.__file__, what, str(folder), str(artifact), name]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_each_publish_is_the_next_version_and_latest_moves(registry: InterventionRegistry, tmp_path: Path) -> None:
    hashes = []
    for number in (1, 2, 3):
        folder = make_artifact(tmp_path / f"a{number}", seed=number)
        hashes.append(load_artifact(folder).content_hash)
        assert registry.publish(OWNER, "tone", folder).id == f"tone@{number}"
        assert resolve(registry, "tone") == resolve(registry, "tone@latest") == f"tone@{number}"
    for number in (1, 2, 3):
        found = registry.resolve(OWNER, Reference.parse(f"tone@{number}"))
        assert found.row.content_hash == load_artifact(found.folder).content_hash == hashes[number - 1]
    assert names(registry) == ["tone"]
    assert registry.list_page("somebody else") == ([], False)


def test_version_numbers_are_never_reused(registry: InterventionRegistry, artifact: Path) -> None:
    for _ in range(3):
        registry.publish(OWNER, "tone", artifact)
    registry.delete(OWNER, "tone", 3)
    assert resolve(registry, "tone") == "tone@2"
    assert registry.publish(OWNER, "tone", artifact).id == "tone@4"
    registry.delete(OWNER, "tone")
    with pytest.raises(NotFound):
        registry.get(OWNER, "tone")
    assert registry.publish(OWNER, "tone", artifact).id == "tone@5"


def test_an_owners_interventions_have_a_quota_that_deleting_gives_back(tmp_path: Path, artifact: Path) -> None:
    size = sum(file.stat().st_size for file in artifact.iterdir())
    registry = open_registry(tmp_path, max_owner_bytes=2 * size)
    registry.publish(OWNER, "tone", artifact)
    registry.publish(OWNER, "mood", artifact)
    with pytest.raises(QuotaExceeded, match=f"{2 * size} of {2 * size} bytes") as refused:
        registry.publish(OWNER, "tone", artifact)
    assert (refused.value.status, refused.value.code) == (413, "storage_quota_exceeded")
    assert len(list((tmp_path / "blobs" / "interventions").iterdir())) == 2, "what was refused is not stored"
    registry.publish("somebody else", "tone", artifact)
    registry.delete(OWNER, "mood")
    assert registry.publish(OWNER, "tone", artifact).id == "tone@2"


def test_a_job_publishes_once(registry: InterventionRegistry, artifact: Path) -> None:
    first = registry.publish(OWNER, "tone", artifact, job_id="ftjob-1")
    again = registry.publish(OWNER, "tone", artifact, job_id="ftjob-1")
    assert first.id == again.id
    assert registry.get(OWNER, "tone").versions == [1]
    assert len(list(first.folder.parent.iterdir())) == 1, "what the second attempt stored is removed"


def test_user_aliases_do_not_move_with_new_versions(registry: InterventionRegistry, artifact: Path) -> None:
    registry.publish(OWNER, "tone", artifact)
    registry.set_alias(OWNER, "tone", "stable", 1)
    registry.publish(OWNER, "tone", artifact)
    assert resolve(registry, "tone@stable") == "tone@1"
    with pytest.raises(Conflict, match="stable"):
        registry.delete(OWNER, "tone", 1)
    registry.set_alias(OWNER, "tone", "stable", 2)
    registry.delete(OWNER, "tone", 1)
    registry.delete_alias(OWNER, "tone", "stable")
    with pytest.raises(NotFound, match=r"versions \[2\] and aliases \['latest'\]"):
        resolve(registry, "tone@stable")
    for alias in ("7", "latest", "", "a b"):
        with pytest.raises(InvalidRequest):
            registry.set_alias(OWNER, "tone", alias, 2)
    with pytest.raises(NotFound):
        registry.set_alias(OWNER, "tone", "stable", 9)
    with pytest.raises(NotFound):
        registry.delete_alias(OWNER, "tone", "never")


@pytest.mark.parametrize("name", ["", "-a", "a/b", "a@1", "ä", "x" * 65, "../a"])
def test_an_invalid_name_is_refused(registry: InterventionRegistry, artifact: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="expected 1 to 64"):
        registry.publish(OWNER, name, artifact)


def test_near_names_are_offered(registry: InterventionRegistry, artifact: Path) -> None:
    registry.publish(OWNER, "sentiment", artifact)
    with pytest.raises(NotFound, match=r"Did you mean 'sentiment'\?"):
        resolve(registry, "sentimint")


def test_download_and_upload_are_each_others_opposite(registry: InterventionRegistry, artifact: Path) -> None:
    registry.publish(OWNER, "tone", artifact)
    data = registry.download(OWNER, Reference.parse("tone"))
    copy = registry.upload(OWNER, "copy", data)
    assert copy.id == "copy@1"
    assert copy.row.manifest == registry.resolve(OWNER, Reference.parse("tone")).row.manifest


@pytest.mark.parametrize(
    ("field", "value", "overridable"),
    [("weights_hash", "other", True), ("chat_template_hash", "new", True), ("hidden_size", 32, False)],
)
def test_an_intervention_for_another_base_is_refused(
    tmp_path: Path, field: str, value: object, *, overridable: bool
) -> None:
    other = make_artifact(tmp_path / "other", base=BASE.model_copy(update={field: value}))
    with pytest.raises(InvalidRequest, match=f"{field} is {value!r}, the base has") as refused:
        open_registry(tmp_path).publish(OWNER, "tone", other)
    assert refused.value.code == "fingerprint_mismatch"
    if overridable:
        assert open_registry(tmp_path, override=True).publish(OWNER, "tone", other).id == "tone@1"
    else:
        with pytest.raises(InvalidRequest):
            open_registry(tmp_path, override=True).publish(OWNER, "tone", other)


def test_a_damaged_artifact_is_refused_and_leaves_nothing(registry: InterventionRegistry, artifact: Path) -> None:
    edits = artifact / "edits.safetensors"
    content = bytearray(edits.read_bytes())
    content[-1] ^= 1
    edits.write_bytes(content)
    with pytest.raises(InvalidRequest, match="content_hash is"):
        registry.publish(OWNER, "tone", artifact)
    assert names(registry) == []
    assert not (artifact.parent / "blobs" / "interventions").exists()


def test_a_version_in_use_is_deleted_only_by_force_once_its_requests_end(
    registry: InterventionRegistry, artifact: Path
) -> None:
    registry.publish(OWNER, "tone", artifact)
    held = registry.resolve(OWNER, Reference.parse("tone"))
    registry.pin(held)
    registry.pin(held)
    with pytest.raises(Conflict, match="2 running request"):
        registry.delete(OWNER, "tone")
    registry.delete(OWNER, "tone", force=True)
    assert load_artifact(held.folder), "the running requests still find it"
    with pytest.raises(NotFound):
        resolve(registry, "tone")
    registry.pin(held)  # the next item of a run that already pins it
    registry.unpin(held)
    registry.unpin(held)
    assert held.folder.exists()
    registry.unpin(held)
    with pytest.raises(NotFound, match="has been deleted"):
        registry.pin(held)
    await_that(lambda: not held.folder.exists())


def test_concurrent_publishing_from_threads_and_processes_loses_and_repeats_nothing(
    registry: InterventionRegistry, artifact: Path, tmp_path: Path
) -> None:
    others = [process("many", tmp_path, artifact, "tone") for _ in range(2)]
    seen: list[str] = []

    def publish() -> None:
        for _ in range(10):
            seen.append(registry.publish(OWNER, "tone", artifact).id)

    threads = [threading.Thread(target=publish) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in others:
        seen += other.communicate(timeout=60)[0].split()
        assert other.returncode == 0
    assert sorted(seen) == sorted(f"tone@{number}" for number in range(1, 41))
    assert resolve(registry, "tone") == "tone@40"


def test_a_full_disk_is_reported_and_nothing_is_half_published(registry: InterventionRegistry, tmp_path: Path) -> None:
    big = make_artifact(tmp_path / "big", rank=2000)
    output, _ = process("full", tmp_path, big, "tone").communicate(timeout=60)
    assert "no room" in output
    assert names(registry) == []
    assert not list((tmp_path / "blobs" / "interventions").iterdir())
    assert registry.publish(OWNER, "tone", big).id == "tone@1", "with room again it works"


def test_a_kill_between_artifact_and_row_publishes_nothing_and_is_swept(
    registry: InterventionRegistry, artifact: Path, tmp_path: Path
) -> None:
    registry.publish(OWNER, "kept", artifact)
    killed = process("killed", tmp_path, artifact, "tone")
    assert killed.wait(60) == -signal.SIGKILL
    assert names(registry) == ["kept"]
    folders = list((tmp_path / "blobs" / "interventions").iterdir())
    assert len(folders) == 2
    assert registry.sweep() == [], "it may belong to a publish that is under way"
    for folder in folders:
        os.utime(folder, (0, 0))
    assert len(registry.sweep()) == 1
    assert load_artifact(registry.resolve(OWNER, Reference.parse("kept")).folder)


def test_any_fsspec_url_can_hold_the_artifacts(tmp_path: Path, artifact: Path) -> None:
    registry = open_registry(tmp_path, blob_url=f"memory://{uuid.uuid4().hex}")
    registry.publish(OWNER, "tone", artifact)
    version = registry.resolve(OWNER, Reference.parse("tone"))
    assert load_artifact(version.folder).content_hash == version.row.content_hash
    assert unpack(registry.download(OWNER, Reference.parse("tone")), tmp_path / "again")
    registry.delete(OWNER, "tone")
    assert not version.folder.exists(), "nor is the cached copy"
