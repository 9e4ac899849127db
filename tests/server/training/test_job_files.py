"""Files of jobs: small checkpoints, full disks, eviction and expiry."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from interruptions import kill_at_step, on_step
from safetensors.torch import load_file
from workspace import CHECKPOINT_STEPS, OWNER, Workspace

from reftserve.server.errors import QuotaExceeded, StorageFull
from reftserve.server.storage.blobs import TRASH
from reftserve.server.storage.leases import Lease
from reftserve.server.storage.tables import Job


def test_a_killed_workers_half_written_files_are_removed_when_the_job_resumes(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = expiring.create()
    kill_at_step(expiring.worker("a"), monkeypatch, step=6)
    folder = expiring.settings.data / "blobs" / "jobs" / job_id
    for name, age_s in (("checkpoint-8-old", 7200), ("checkpoint-8-new", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    worker = expiring.worker("b")
    sweep = worker.runs.begin(worker.take())
    assert sweep.step == CHECKPOINT_STEPS
    left = sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())
    assert left == [f"checkpoint-{CHECKPOINT_STEPS}", "data"]
    assert expiring.store.blobs.children(TRASH) == [], "the trash is outside max_jobs_bytes"


def test_an_outdated_checkpoint_that_cannot_be_deleted_does_not_fail_its_job(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    worker = workspace.worker()
    lease = worker.take()

    def away(key: str) -> NoReturn:
        raise OSError(errno.EIO, "the store is away")

    monkeypatch.setattr(workspace.store.blobs, "delete", away)
    for step in (1, 2, 3):
        worker.files.write_checkpoint(lease, step, {}, lambda folder: fill(folder, 1))
    assert [row.step for row in workspace.repository.checkpoints(job_id) if row.kept] == [3, 2]


def test_the_files_of_an_ended_job_go_although_nothing_new_may_be_written(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    worker = workspace.worker()
    worker.files.write_checkpoint(worker.take(), 1, {}, lambda folder: fill(folder, 1))
    workspace.jobs.cancel(OWNER, job_id)

    def full() -> NoReturn:
        raise StorageFull("full")

    monkeypatch.setattr(workspace.store.database.reserve, "require", full)
    assert worker.files.remove(job_id)
    assert workspace.kept() == []
    assert workspace.job(job_id).lease_worker is None


def test_a_checkpoint_is_as_small_as_the_trained_weights(workspace: Workspace) -> None:
    workspace.create()
    worker = workspace.worker()
    lease = worker.take()
    sweep = worker.runs.begin(lease)
    worker.runs.advance(lease, sweep)
    folder = worker.files.newest_checkpoint(lease)
    assert folder is not None
    largest = max(parameter.numel() for parameter in sweep.leader.intervention.parameters())
    for name, tensor in load_file(folder / "trial-0.safetensors").items():
        assert tensor.numel() <= largest, f"{name} is as large as the base's own matrices"


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [flipped, cut_short, emptied, Path.unlink])
@pytest.mark.parametrize("name", ["trial-0.safetensors", "trial-0.json", "sweep.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], name: str
) -> None:
    expiring.create("undisturbed")
    expiring.worker("a").work()
    job_id = expiring.create("disturbed")
    kill_at_step(expiring.worker("a"), monkeypatch, step=9)
    (newest,) = (expiring.settings.data / "blobs" / "jobs" / job_id).glob(f"checkpoint-{2 * CHECKPOINT_STEPS}-*")
    damage(newest / name)
    expiring.worker("b").work()
    (warning,) = warnings(expiring, job_id)
    assert warning.startswith(f"The checkpoint at step {2 * CHECKPOINT_STEPS} ")
    assert name in warning
    assert f"Resumed from the checkpoint at step {CHECKPOINT_STEPS}" in expiring.messages(job_id)
    assert expiring.job(job_id).status == "succeeded"
    assert expiring.content_hash("disturbed") == expiring.content_hash("undisturbed")


def test_a_job_without_a_whole_checkpoint_starts_again(expiring: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    expiring.create("undisturbed")
    expiring.worker("a").work()
    job_id = expiring.create("disturbed")
    kill_at_step(expiring.worker("a"), monkeypatch, step=9)
    for state in (expiring.settings.data / "blobs" / "jobs" / job_id).glob("checkpoint-*/trial-0.safetensors"):
        flipped(state)
    expiring.worker("b").work()
    assert warnings(expiring, job_id)[-1] == "No checkpoint is whole; the job starts again"
    assert expiring.job(job_id).status == "succeeded"
    assert expiring.content_hash("disturbed") == expiring.content_hash("undisturbed")


def warnings(workspace: Workspace, job_id: str) -> list[str]:
    events = workspace.repository.events(job_id, before=None, limit=1000)
    return [event.message for event in reversed(events) if event.level == "warn"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_fails_the_job_with_its_previous_checkpoint_intact(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    job_id = workspace.create()
    put_folder = workspace.store.blobs._copy

    def full(source: Path, target: str) -> None:
        if f"checkpoint-{2 * CHECKPOINT_STEPS}-" in target and target.endswith(".safetensors"):
            raise OSError(code, "no room")
        put_folder(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(workspace.store.blobs, "_copy", full)
        workspace.worker().work()
    job = workspace.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "storage_full")
    left = [key.rsplit("/", 1)[-1] for key in workspace.store.blobs.children(f"jobs/{job_id}")]
    assert [name.rsplit("-", 1)[0] for name in left] == [f"checkpoint-{CHECKPOINT_STEPS}", "data"]
    workspace.jobs.retry(OWNER, job_id)
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"
    assert workspace.steps(job_id)[2 * CHECKPOINT_STEPS] == CHECKPOINT_STEPS + 1


def test_files_of_ended_jobs_are_evicted_and_those_of_live_jobs_are_kept(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    workspace = Workspace(tiny_llama_folder, tmp_path, max_jobs_bytes=1000)
    worker = workspace.worker()
    ended, living = workspace.create("ended"), workspace.create("living")

    def write(lease: Lease[Job], step: int, size: int) -> None:
        worker.files.write_checkpoint(lease, step, {}, lambda folder: fill(folder, size))

    write(worker.take(), 1, 600)
    workspace.jobs.cancel(OWNER, ended)
    lease = worker.take()
    write(lease, 1, 300)
    assert workspace.kept() == [ended, living]
    write(lease, 2, 300)
    assert workspace.kept() == [living], "the one that has ended had to go"
    with pytest.raises(QuotaExceeded, match="max_jobs_bytes"):
        write(lease, 3, 500)
    newest = worker.files.newest_checkpoint(lease)
    assert newest is not None
    assert (newest.name.split("-")[1], (newest / "f").stat().st_size) == ("2", 300), "the one before is whole"
    workspace.jobs.retry(OWNER, ended)
    assert worker.files.newest_checkpoint(worker.take()) is None, "it begins again"


def test_a_job_without_storage_space_fails_with_that_reason(tiny_llama_folder: Path, tmp_path: Path) -> None:
    workspace = Workspace(tiny_llama_folder, tmp_path, max_jobs_bytes=1)
    job_id = workspace.create()
    workspace.worker().work()
    job = workspace.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], workspace.kept()) == ("failed", "storage_quota_exceeded", [])


def test_files_of_ended_jobs_expire_and_those_of_others_stay(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tiny_llama_folder, tmp_path)
    ended, paused = workspace.create("ended"), workspace.create("paused")
    for job_id, stop in ((ended, workspace.jobs.cancel), (paused, workspace.jobs.pause)):
        with monkeypatch.context() as patch:
            on_step(patch, 6, lambda stop=stop, job_id=job_id: stop(OWNER, job_id))  # type: ignore[misc]
            workspace.worker().work()
    assert workspace.worker().files.sweep() == []
    later = Workspace(tiny_llama_folder, tmp_path, keep_jobs_s=0)
    assert later.worker().files.sweep() == [ended]
    assert later.kept() == [paused]
    assert all(not row.kept for row in later.repository.checkpoints(ended))
    later.jobs.resume(OWNER, paused)
    later.worker().work()
    assert later.job(paused).status == "succeeded"


def fill(folder: Path, size: int) -> None:
    (folder / "f").write_bytes(bytes(size))
