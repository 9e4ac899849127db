"""One job's run: interrupted anywhere, resumed by any worker, ended once; and every reason for failure."""

from __future__ import annotations

import errno
import gc
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from workspace import CHECKPOINT_STEPS, OWNER, STEPS, Worker, Workspace

from reftserve.interventions import load_artifact
from reftserve.server.errors import Conflict, QuotaExceeded
from reftserve.server.registry.names import Reference
from reftserve.server.storage.leases import Lease, LeaseLost
from reftserve.server.storage.tables import Job, Version
from reftserve.server.training.activation_cache import ActivationCache, Arena
from reftserve.server.training.job_repository import JobRepository
from reftserve.server.training.job_runner import MAX_ATTEMPTS
from reftserve.server.training.sweep import Sweep
from reftserve.server.training.varlen import VarlenModel


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def workspace(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    return Workspace(tiny_llama_folder, tmp_path)


@pytest.fixture
def expiring(tiny_llama_folder: Path, tmp_path: Path) -> Workspace:
    """A workspace whose leases expire at once."""
    return Workspace(tiny_llama_folder, tmp_path, lease_s=1e-6)


def kill_at_step(worker: Worker, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make the worker's next run end in the middle of an optimizer step, without cleanup."""
    advance = Sweep.advance

    def killed(sweep: Sweep) -> Any:
        if sweep.step == step:
            raise Killed
        return advance(sweep)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "advance", killed)
        with pytest.raises(Killed):
            worker.work()


def test_a_job_resumes_on_another_worker_from_its_checkpoint_to_the_same_result(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = expiring.create("undisturbed"), expiring.create("disturbed")
    expiring.worker("a").work()
    kill_at_step(expiring.worker("a"), monkeypatch, step=6)
    expiring.worker("b").work()
    assert expiring.job(undisturbed).status == expiring.job(disturbed).status == "succeeded"
    assert expiring.steps(disturbed) == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10], "again from the checkpoint at step 4"
    assert expiring.content_hash("disturbed") == expiring.content_hash("undisturbed")
    assert expiring.kept() == [], "what only a living job needs is gone"


def test_a_worker_whose_job_was_taken_over_writes_and_publishes_nothing(expiring: Workspace) -> None:
    job_id = expiring.create()
    slow, live = expiring.worker("slow"), expiring.worker("live")
    old = slow.take()
    sweep = slow.runs.begin(old)
    while sweep.step < STEPS:
        slow.runs.advance(old, sweep)
    new = live.take()
    events = expiring.messages(job_id)
    with pytest.raises(LeaseLost):
        slow.runs.publish(old, sweep)
    with pytest.raises(LeaseLost):
        slow.runs.fail(old, ValueError("late"))
    slow.runs.execute(old)
    assert expiring.messages(job_id) == events
    assert expiring.published("tone") == []
    assert expiring.store.files.list_all(OWNER, purpose="fine-tune-results") == []
    live.runs.execute(new)
    assert (expiring.job(job_id).status, expiring.published("tone")) == ("succeeded", [1])


def test_a_lease_lost_during_publishing_leaves_no_version(expiring: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = expiring.create()
    slow, live = expiring.worker("slow"), expiring.worker("live")
    put_folder = expiring.store.blobs.put_folder

    def overtaken(key: str, source: Path) -> None:
        put_folder(key, source)
        if key.startswith("interventions/"):
            live.take()

    monkeypatch.setattr(expiring.store.blobs, "put_folder", overtaken)
    slow.work()
    assert expiring.published("tone") == []
    assert expiring.store.blobs.children("interventions") == [], "nor its artifact"
    monkeypatch.undo()
    live.work()
    assert (expiring.job(job_id).fine_tuned_model, expiring.published("tone")) == ("tone@1", [1])


def test_a_job_killed_during_publishing_publishes_once_and_has_one_result(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = expiring.create()

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(expiring.store.interventions, "publish", killed)
        with pytest.raises(Killed):
            expiring.worker("a").work()
    expiring.worker("b").work()
    job = expiring.job(job_id)
    assert (job.status, job.fine_tuned_model, expiring.published("tone")) == ("succeeded", "tone@1", [1])
    assert [file.id for file in expiring.store.files.list_all(OWNER, purpose="fine-tune-results")] == job.result_files
    assert expiring.steps(job_id) == list(range(1, STEPS + 1)), "no step was done again"


def test_a_paused_job_holds_no_memory_or_worker_and_has_the_same_result(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.create("straight")
    worker, before = workspace.worker(), sweeps()
    worker.work()
    job_id = workspace.create("paused")
    on_step(monkeypatch, 6, lambda: workspace.jobs.pause(OWNER, job_id))
    worker.work()
    assert (workspace.job(job_id).status, workspace.steps(job_id)[-1]) == ("paused", 6), (
        "before the next optimizer step"
    )
    assert worker.leases.take() is None
    assert sweeps() == before
    assert arenas() == 0, "what it kept of its examples has gone"
    assert workspace.jobs.resume(OWNER, job_id).status == "queued"
    workspace.worker("another").work()
    assert workspace.steps(job_id) == list(range(1, STEPS + 1)), "no step is lost"
    assert workspace.content_hash("paused") == workspace.content_hash("straight")


def test_a_job_without_improvement_ends_early_if_early_stopping_is_set(workspace: Workspace) -> None:
    far_too_fast = {"n_epochs": 6, "learning_rate": 1.0}
    whole, early = (
        workspace.create(name, hyperparameters=far_too_fast | patience)
        for name, patience in (("whole", {}), ("early", {"early_stopping_epochs": 1}))
    )
    for job_id in (whole, early):
        workspace.worker().work()
        assert workspace.job(job_id).status == "succeeded"
    assert workspace.steps(whole)[-1] == 3 * STEPS
    assert workspace.steps(early)[-1] < 3 * STEPS


def test_a_pause_right_after_a_checkpoint_keeps_it(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = workspace.create()
    on_step(monkeypatch, CHECKPOINT_STEPS, lambda: workspace.jobs.pause(OWNER, job_id))
    workspace.worker().work()
    assert (workspace.job(job_id).status, workspace.steps(job_id)[-1]) == ("paused", CHECKPOINT_STEPS)
    workspace.jobs.resume(OWNER, job_id)
    workspace.worker("another").work()
    assert f"Resumed from the checkpoint at step {CHECKPOINT_STEPS}" in workspace.messages(job_id)
    assert workspace.steps(job_id) == list(range(1, STEPS + 1)), "no step is done again"


def test_a_pause_withdrawn_while_its_checkpoint_is_written_has_no_effect(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    on_step(monkeypatch, 6, lambda: workspace.jobs.pause(OWNER, job_id))
    save = Sweep.save

    def withdrawn(sweep: Sweep, folder: Path) -> None:
        workspace.jobs.resume(OWNER, job_id)
        save(sweep, folder)

    monkeypatch.setattr(Sweep, "save", withdrawn)
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"


def test_a_job_resumes_from_its_checkpoint_after_the_database_was_lost(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    worker = workspace.worker()
    with monkeypatch.context() as patch:
        on_step(patch, 6, lambda: patch.setattr(JobRepository, "progress", breaks_off))
        with pytest.raises(OperationalError):
            worker.work()
    assert workspace.job(job_id).status == "running", "it has not failed"
    worker.leases.release(in_order=False)
    worker.work()
    assert workspace.job(job_id).status == "succeeded"
    assert workspace.steps(job_id) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("cause", [OperationalError("COMMIT", {}, Exception("connection lost")), SystemExit()])
def test_a_commit_without_a_reply_leaves_the_published_version_whole(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    job_id = expiring.create()
    commit = Session.commit

    def committed_without_an_answer(session: Session) -> None:
        publishes = any(isinstance(row, Version) for row in session)
        commit(session)
        if publishes:
            raise cause

    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", committed_without_an_answer)
        with pytest.raises(type(cause)):
            expiring.worker("a").work()
    assert (expiring.job(job_id).status, expiring.published("tone")) == ("succeeded", [1])
    version = expiring.store.interventions.resolve(OWNER, Reference("tone", 1))
    assert load_artifact(version.folder).content_hash == expiring.content_hash("tone")


def test_a_pause_during_data_preparation_does_not_wait_for_the_first_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    fill = ActivationCache.fill

    def asked_to_pause(*arguments: Any, **named: Any) -> None:
        workspace.jobs.pause(OWNER, job_id)
        fill(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "fill", asked_to_pause)
        workspace.worker().work()
    assert (workspace.job(job_id).status, workspace.steps(job_id)) == ("paused", [])
    workspace.jobs.resume(OWNER, job_id)
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"


def test_jobs_on_the_same_data_share_one_activation_cache(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    constants = VarlenModel.constants

    def counted(*arguments: Any, **named: Any) -> Any:
        computed.append(arguments)
        return constants(*arguments, **named)

    monkeypatch.setattr(VarlenModel, "constants", counted)
    worker = workspace.worker()
    for name, is_new in (("first", True), ("second", False)):
        workspace.create(name)
        computed.clear()
        worker.work()
        assert bool(computed) is is_new
    workspace.create("other", positions="f1+l1")
    computed.clear()
    worker.work()
    assert computed, "edits elsewhere leave less constant"
    worker.runs.forget()
    workspace.create("third")
    computed.clear()
    worker.work()
    assert computed, "when no job follows nothing is kept"
    assert workspace.content_hash("first") == workspace.content_hash("second") == workspace.content_hash("third")


def test_a_diverging_job_publishes_its_best_weights_and_warns(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()
    advance = Sweep.advance

    def ruined(sweep: Sweep) -> Any:
        if sweep.step == 7:
            for parameter in sweep.leader.intervention.parameters():
                parameter.data.fill_(float("nan"))
        return advance(sweep)

    monkeypatch.setattr(Sweep, "advance", ruined)
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"
    warning = next(
        event for event in workspace.repository.events(job_id, before=None, limit=99) if event.level == "warn"
    )
    assert "diverged at step 8; the published weights are the best before it, of step 5" in warning.message
    steps = [
        event
        for event in workspace.repository.events(job_id, before=None, limit=99)
        if event.data and "step" in event.data
    ]
    assert (steps[0].data or {})["train_loss"] is None, "what is no number is null"


def test_a_killed_workers_half_written_files_are_removed_when_the_job_resumes(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = expiring.create()
    kill_at_step(expiring.worker("a"), monkeypatch, step=6)
    folder = expiring.settings.data / "blobs" / "jobs" / job_id
    for name, age_s in (("checkpoint-8-old", 7200), ("checkpoint-8-new", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    for kept in folder.glob("*"):
        if kept.name != "checkpoint-8-new":
            os.utime(kept, (time.time() - 7200,) * 2)
    worker = expiring.worker("b")
    sweep = worker.runs.begin(worker.take())
    assert sweep.step == CHECKPOINT_STEPS
    left = sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())
    assert left == [f"checkpoint-{CHECKPOINT_STEPS}", "checkpoint-8", "training.jsonl"], "what is new may be another's"


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


def test_a_queued_job_is_paused_at_once_and_a_pause_can_be_withdrawn(workspace: Workspace) -> None:
    job_id = workspace.create()
    assert workspace.jobs.pause(OWNER, job_id).status == "paused"
    assert workspace.jobs.pause(OWNER, job_id).status == "paused", "once more changes nothing"
    assert workspace.jobs.resume(OWNER, job_id).status == "queued"
    worker = workspace.worker()
    lease = worker.take()
    assert workspace.jobs.pause(OWNER, job_id).status == "running", "until its worker has made a checkpoint"
    workspace.jobs.resume(OWNER, job_id)
    worker.runs.execute(lease)
    assert workspace.job(job_id).status == "succeeded"


def test_a_cancelled_job_ends_at_once_and_its_worker_stops_before_the_next_step(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, before = workspace.create(), sweeps()
    on_step(monkeypatch, 6, lambda: workspace.jobs.cancel(OWNER, job_id))
    workspace.worker().work()
    assert workspace.job(job_id).status == "cancelled"
    assert workspace.steps(job_id) == [1, 2, 3, 4, 5], "the step on the way is not even written down"
    assert workspace.messages(job_id)[-1] == "The job was cancelled"
    assert workspace.published("tone") == []
    assert sweeps() == before
    with pytest.raises(Conflict, match=r"has ended \(cancelled\)"):
        workspace.jobs.cancel(OWNER, job_id)


def test_a_cancelled_job_is_retried_from_its_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = workspace.create()
    with monkeypatch.context() as patch:
        on_step(patch, 6, lambda: workspace.jobs.cancel(OWNER, job_id))
        workspace.worker().work()
    assert workspace.jobs.retry(OWNER, job_id).status == "queued"
    workspace.worker().work()
    job = workspace.job(job_id)
    assert (job.status, job.error, workspace.published("tone")) == ("succeeded", None, [1])
    assert workspace.steps(job_id) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    with pytest.raises(Conflict, match="is succeeded"):
        workspace.jobs.retry(OWNER, job_id)


def test_a_failed_job_can_be_retried_after_its_file_is_deleted(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = workspace.create()

    def broken() -> None:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        on_step(patch, 6, broken)
        workspace.worker().work()
    job = workspace.job(job_id)
    assert (job.status, job.error) == (
        "failed",
        {"code": "internal_error", "message": "the device is on fire", "param": None},
    )
    workspace.store.files.delete(OWNER, job.training_file)
    workspace.jobs.retry(OWNER, job_id)
    workspace.worker().work()
    assert (workspace.job(job_id).status, workspace.steps(job_id)[5:]) == ("succeeded", [5, 6, 7, 8, 9, 10])


def test_a_job_without_its_data_fails_and_names_the_file(workspace: Workspace) -> None:
    deleted, lost = workspace.create("deleted"), workspace.create("lost")
    workspace.store.files.delete(OWNER, workspace.job(deleted).training_file)
    workspace.store.files.path(workspace.store.files.get(OWNER, workspace.job(lost).training_file)).unlink()
    for job_id, code in ((deleted, "file_not_found"), (lost, "file_content_missing")):
        workspace.worker().work()
        job = workspace.job(job_id)
        assert job.status == "failed"
        assert job.error is not None
        assert (job.error["code"], job.error["param"]) == (code, "training_file")
        assert job.training_file in job.error["message"]


def test_a_job_made_for_another_base_fails_with_that_reason(workspace: Workspace) -> None:
    job_id = workspace.create()
    changed = replace(
        workspace.base, fingerprint=workspace.base.fingerprint.model_copy(update={"weights_hash": "other"})
    )
    workspace.worker("a", base=changed).work()
    job = workspace.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", "fingerprint_mismatch", "model")
    assert "weights_hash" in job.error["message"]
    workspace.jobs.retry(OWNER, job_id)
    workspace.worker("b").work()
    assert workspace.job(job_id).status == "succeeded", "the right base is back"


def test_a_job_that_repeatedly_kills_its_workers_fails(expiring: Workspace) -> None:
    job_id = expiring.create()
    worker = expiring.worker()
    for _ in range(MAX_ATTEMPTS):
        worker.take()
        time.sleep(1e-5)
    worker.work()
    error = expiring.job(job_id).error
    assert error is not None
    assert error["code"] == "worker_lost"


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
    assert [name.rsplit("-", 1)[0] for name in left] == [f"checkpoint-{CHECKPOINT_STEPS}", "training.jsonl"]
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


def test_the_first_event_reports_the_jobs_creation(workspace: Workspace) -> None:
    events, more = workspace.jobs.events(OWNER, workspace.create(), after=None, limit=10)
    assert [event.message.split()[0] for event in events] == ["Created"]
    assert not more


def test_jobs_are_listed_newest_first(workspace: Workspace) -> None:
    created = [workspace.create() for _ in range(8)]
    assert [job.id for job in workspace.jobs.list_page(OWNER, after=None, limit=20)[0]] == created[::-1]


def fill(folder: Path, size: int) -> None:
    """Write a checkpoint of `size` bytes."""
    (folder / "f").write_bytes(bytes(size))


def breaks_off(*_: object, **__: object) -> None:
    """Raise the error of a lost database."""
    raise OperationalError("UPDATE", {}, Exception("connection lost"))


def sweeps() -> int:
    """Return the number of sweeps in memory, with their trainers."""
    gc.collect()
    return sum(type(found) is Sweep for found in gc.get_objects())


def arenas() -> int:
    """Return the number of activation arenas in memory."""
    gc.collect()
    return sum(type(found) is Arena for found in gc.get_objects())


def on_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Call `act` at the end of the given step."""
    advance = Sweep.advance

    def with_act(sweep: Sweep) -> Any:
        metrics = advance(sweep)
        if metrics.step == step:
            act()
        return metrics

    patch.setattr(Sweep, "advance", with_act)
