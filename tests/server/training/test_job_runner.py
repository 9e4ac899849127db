"""One job's run: interrupted anywhere, carried on by anyone, ended once; and every reason for which it fails."""

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
from workplace import CHECKPOINT_STEPS, OWNER, STEPS, Worker, Workplace

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
    """The process ends here."""


@pytest.fixture
def place(tiny_llama_folder: Path, tmp_path: Path) -> Workplace:
    return Workplace(tiny_llama_folder, tmp_path)


@pytest.fixture
def hasty(tiny_llama_folder: Path, tmp_path: Path) -> Workplace:
    """Leases that run out at once."""
    return Workplace(tiny_llama_folder, tmp_path, lease_s=1e-6)


def kill_at_step(worker: Worker, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The worker's next run ends in the middle of an optimizer step, without another word."""
    advance = Sweep.advance

    def killed(sweep: Sweep) -> Any:
        if sweep.step == step:
            raise Killed
        return advance(sweep)

    with monkeypatch.context() as patch:
        patch.setattr(Sweep, "advance", killed)
        with pytest.raises(Killed):
            worker.work()


def test_a_job_goes_on_at_another_worker_from_the_last_checkpoint_to_the_same_end(
    hasty: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, disturbed = hasty.create("undisturbed"), hasty.create("disturbed")
    hasty.worker("a").work()
    kill_at_step(hasty.worker("a"), monkeypatch, step=6)
    hasty.worker("b").work()
    assert hasty.job(undisturbed).status == hasty.job(disturbed).status == "succeeded"
    assert hasty.steps(disturbed) == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10], "again from the checkpoint at step 4"
    assert hasty.content_hash("disturbed") == hasty.content_hash("undisturbed")
    assert hasty.kept() == [], "what only a living job needs is gone"


def test_a_worker_whose_job_was_taken_over_writes_and_publishes_nothing(hasty: Workplace) -> None:
    job_id = hasty.create()
    slow, live = hasty.worker("slow"), hasty.worker("live")
    old = slow.take()
    sweep = slow.runs.begin(old)
    while sweep.step < STEPS:
        slow.runs.advance(old, sweep)
    new = live.take()
    events = hasty.messages(job_id)
    with pytest.raises(LeaseLost):
        slow.runs.publish(old, sweep)
    with pytest.raises(LeaseLost):
        slow.runs.fail(old, ValueError("late"))
    slow.runs.execute(old)
    assert hasty.messages(job_id) == events
    assert hasty.published("tone") == []
    assert hasty.store.files.list_all(OWNER, purpose="fine-tune-results") == []
    live.runs.execute(new)
    assert (hasty.job(job_id).status, hasty.published("tone")) == ("succeeded", [1])


def test_a_lease_that_is_lost_while_publishing_leaves_no_version(
    hasty: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = hasty.create()
    slow, live = hasty.worker("slow"), hasty.worker("live")
    put_folder = hasty.store.blobs.put_folder

    def overtaken(key: str, source: Path) -> None:
        put_folder(key, source)
        if key.startswith("interventions/"):
            live.take()

    monkeypatch.setattr(hasty.store.blobs, "put_folder", overtaken)
    slow.work()
    assert hasty.published("tone") == []
    assert hasty.store.blobs.children("interventions") == [], "nor its artifact"
    monkeypatch.undo()
    live.work()
    assert (hasty.job(job_id).fine_tuned_model, hasty.published("tone")) == ("tone@1", [1])


def test_a_job_that_was_killed_while_publishing_publishes_once_and_has_one_result(
    hasty: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = hasty.create()

    def killed(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hasty.store.interventions, "publish", killed)
        with pytest.raises(Killed):
            hasty.worker("a").work()
    hasty.worker("b").work()
    job = hasty.job(job_id)
    assert (job.status, job.fine_tuned_model, hasty.published("tone")) == ("succeeded", "tone@1", [1])
    assert [file.id for file in hasty.store.files.list_all(OWNER, purpose="fine-tune-results")] == job.result_files
    assert hasty.steps(job_id) == list(range(1, STEPS + 1)), "no step was done again"


def test_a_paused_job_holds_no_memory_and_no_worker_and_ends_as_if_it_had_not_been_paused(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.create("straight")
    worker, before = place.worker(), sweeps()
    worker.work()
    job_id = place.create("paused")
    on_step(monkeypatch, 6, lambda: place.jobs.pause(OWNER, job_id))
    worker.work()
    assert (place.job(job_id).status, place.steps(job_id)[-1]) == ("paused", 6), "before the next optimizer step"
    assert worker.leases.take() is None
    assert sweeps() == before
    assert arenas() == 0, "what it kept of its examples has gone"
    assert place.jobs.resume(OWNER, job_id).status == "queued"
    place.worker("another").work()
    assert place.steps(job_id) == list(range(1, STEPS + 1)), "no step is lost"
    assert place.content_hash("paused") == place.content_hash("straight")


def test_a_job_that_does_not_become_better_ends_early_where_that_was_asked_for(place: Workplace) -> None:
    far_too_fast = {"n_epochs": 6, "learning_rate": 1.0}
    whole, early = (
        place.create(name, hyperparameters=far_too_fast | patience)
        for name, patience in (("whole", {}), ("early", {"early_stopping_epochs": 1}))
    )
    for job_id in (whole, early):
        place.worker().work()
        assert place.job(job_id).status == "succeeded"
    assert place.steps(whole)[-1] == 3 * STEPS
    assert place.steps(early)[-1] < 3 * STEPS


def test_a_pause_right_behind_a_checkpoint_keeps_it(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = place.create()
    on_step(monkeypatch, CHECKPOINT_STEPS, lambda: place.jobs.pause(OWNER, job_id))
    place.worker().work()
    assert (place.job(job_id).status, place.steps(job_id)[-1]) == ("paused", CHECKPOINT_STEPS)
    place.jobs.resume(OWNER, job_id)
    place.worker("another").work()
    assert f"Resumed from the checkpoint at step {CHECKPOINT_STEPS}" in place.messages(job_id)
    assert place.steps(job_id) == list(range(1, STEPS + 1)), "no step is done again"


def test_a_pause_that_is_withdrawn_while_its_checkpoint_is_written_does_not_happen(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = place.create()
    on_step(monkeypatch, 6, lambda: place.jobs.pause(OWNER, job_id))
    save = Sweep.save

    def withdrawn(sweep: Sweep, folder: Path) -> None:
        place.jobs.resume(OWNER, job_id)
        save(sweep, folder)

    monkeypatch.setattr(Sweep, "save", withdrawn)
    place.worker().work()
    assert place.job(job_id).status == "succeeded"


def test_a_job_whose_database_breaks_off_goes_on_from_its_checkpoint(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = place.create()
    worker = place.worker()
    with monkeypatch.context() as patch:
        on_step(patch, 6, lambda: patch.setattr(JobRepository, "progress", breaks_off))
        with pytest.raises(OperationalError):
            worker.work()
    assert place.job(job_id).status == "running", "it has not failed"
    worker.leases.release(in_order=False)
    worker.work()
    assert place.job(job_id).status == "succeeded"
    assert place.steps(job_id) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]


@pytest.mark.parametrize("cause", [OperationalError("COMMIT", {}, Exception("connection lost")), SystemExit()])
def test_a_commit_whose_answer_is_lost_leaves_what_it_published_whole(
    hasty: Workplace, monkeypatch: pytest.MonkeyPatch, cause: BaseException
) -> None:
    job_id = hasty.create()
    commit = Session.commit

    def committed_without_an_answer(session: Session) -> None:
        publishes = any(isinstance(row, Version) for row in session)
        commit(session)
        if publishes:
            raise cause

    with monkeypatch.context() as patch:
        patch.setattr(Session, "commit", committed_without_an_answer)
        with pytest.raises(type(cause)):
            hasty.worker("a").work()
    assert (hasty.job(job_id).status, hasty.published("tone")) == ("succeeded", [1])
    version = hasty.store.interventions.resolve(OWNER, Reference("tone", 1))
    assert load_artifact(version.folder).content_hash == hasty.content_hash("tone")


def test_a_pause_while_the_data_is_prepared_does_not_wait_for_the_first_step(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = place.create()
    fill = ActivationCache.fill

    def asked_to_pause(*arguments: Any, **named: Any) -> None:
        place.jobs.pause(OWNER, job_id)
        fill(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ActivationCache, "fill", asked_to_pause)
        place.worker().work()
    assert (place.job(job_id).status, place.steps(job_id)) == ("paused", [])
    place.jobs.resume(OWNER, job_id)
    place.worker().work()
    assert place.job(job_id).status == "succeeded"


def test_jobs_on_the_same_data_compute_what_their_steps_have_in_common_once(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[object] = []
    constants = VarlenModel.constants

    def counted(*arguments: Any, **named: Any) -> Any:
        computed.append(arguments)
        return constants(*arguments, **named)

    monkeypatch.setattr(VarlenModel, "constants", counted)
    worker = place.worker()
    for name, is_new in (("first", True), ("second", False)):
        place.create(name)
        computed.clear()
        worker.work()
        assert bool(computed) is is_new
    place.create("other", positions="f1+l1")
    computed.clear()
    worker.work()
    assert computed, "edits elsewhere leave less constant"
    worker.runs.forget()
    place.create("third")
    computed.clear()
    worker.work()
    assert computed, "when no job follows nothing is kept"
    assert place.content_hash("first") == place.content_hash("second") == place.content_hash("third")


def test_a_job_that_diverges_publishes_its_best_weights_and_says_so(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = place.create()
    advance = Sweep.advance

    def ruined(sweep: Sweep) -> Any:
        if sweep.step == 7:
            for parameter in sweep.leader.intervention.parameters():
                parameter.data.fill_(float("nan"))
        return advance(sweep)

    monkeypatch.setattr(Sweep, "advance", ruined)
    place.worker().work()
    assert place.job(job_id).status == "succeeded"
    warning = next(event for event in place.repository.events(job_id, before=None, limit=99) if event.level == "warn")
    assert "diverged at step 8; the published weights are the best before it, of step 5" in warning.message
    steps = [
        event for event in place.repository.events(job_id, before=None, limit=99) if event.data and "step" in event.data
    ]
    assert (steps[0].data or {})["train_loss"] is None, "what is no number is null"


def test_what_a_killed_worker_left_half_written_is_removed_when_the_job_goes_on(
    hasty: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = hasty.create()
    kill_at_step(hasty.worker("a"), monkeypatch, step=6)
    folder = hasty.settings.data / "blobs" / "jobs" / job_id
    for name, age_s in (("checkpoint-8-old", 7200), ("checkpoint-8-new", 0)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age_s,) * 2)
    for kept in folder.glob("*"):
        if kept.name != "checkpoint-8-new":
            os.utime(kept, (time.time() - 7200,) * 2)
    worker = hasty.worker("b")
    sweep = worker.runs.begin(worker.take())
    assert sweep.step == CHECKPOINT_STEPS
    left = sorted(path.name.rsplit("-", 1)[0] for path in folder.iterdir())
    assert left == [f"checkpoint-{CHECKPOINT_STEPS}", "checkpoint-8", "training.jsonl"], "what is new may be another's"


def test_a_checkpoint_is_as_small_as_what_is_learned(place: Workplace) -> None:
    place.create()
    worker = place.worker()
    lease = worker.take()
    sweep = worker.runs.begin(lease)
    worker.runs.advance(lease, sweep)
    folder = worker.files.newest_checkpoint(lease)
    assert folder is not None
    largest = max(parameter.numel() for parameter in sweep.leader.intervention.parameters())
    for name, tensor in load_file(folder / "trial-0.safetensors").items():
        assert tensor.numel() <= largest, f"{name} is as large as the base's own matrices"


def test_a_job_that_waits_is_paused_at_once_and_a_pause_can_be_withdrawn(place: Workplace) -> None:
    job_id = place.create()
    assert place.jobs.pause(OWNER, job_id).status == "paused"
    assert place.jobs.pause(OWNER, job_id).status == "paused", "once more changes nothing"
    assert place.jobs.resume(OWNER, job_id).status == "queued"
    worker = place.worker()
    lease = worker.take()
    assert place.jobs.pause(OWNER, job_id).status == "running", "until its worker has made a checkpoint"
    place.jobs.resume(OWNER, job_id)
    worker.runs.execute(lease)
    assert place.job(job_id).status == "succeeded"


def test_a_cancelled_job_ends_at_once_and_its_worker_stops_before_the_next_step(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, before = place.create(), sweeps()
    on_step(monkeypatch, 6, lambda: place.jobs.cancel(OWNER, job_id))
    place.worker().work()
    assert place.job(job_id).status == "cancelled"
    assert place.steps(job_id) == [1, 2, 3, 4, 5], "the step on the way is not even written down"
    assert place.messages(job_id)[-1] == "The job was cancelled"
    assert place.published("tone") == []
    assert sweeps() == before
    with pytest.raises(Conflict, match=r"has ended \(cancelled\)"):
        place.jobs.cancel(OWNER, job_id)


def test_a_cancelled_job_is_tried_again_from_its_checkpoint(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = place.create()
    with monkeypatch.context() as patch:
        on_step(patch, 6, lambda: place.jobs.cancel(OWNER, job_id))
        place.worker().work()
    assert place.jobs.retry(OWNER, job_id).status == "queued"
    place.worker().work()
    job = place.job(job_id)
    assert (job.status, job.error, place.published("tone")) == ("succeeded", None, [1])
    assert place.steps(job_id) == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10]
    with pytest.raises(Conflict, match="is succeeded"):
        place.jobs.retry(OWNER, job_id)


def test_a_failed_job_keeps_what_a_retry_needs_even_when_its_file_is_deleted(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = place.create()

    def broken() -> None:
        raise RuntimeError("the device is on fire")

    with monkeypatch.context() as patch:
        on_step(patch, 6, broken)
        place.worker().work()
    job = place.job(job_id)
    assert (job.status, job.error) == (
        "failed",
        {"code": "internal_error", "message": "the device is on fire", "param": None},
    )
    place.store.files.delete(OWNER, job.training_file)
    place.jobs.retry(OWNER, job_id)
    place.worker().work()
    assert (place.job(job_id).status, place.steps(job_id)[5:]) == ("succeeded", [5, 6, 7, 8, 9, 10])


def test_a_job_whose_data_has_gone_fails_and_says_which(place: Workplace) -> None:
    deleted, lost = place.create("deleted"), place.create("lost")
    place.store.files.delete(OWNER, place.job(deleted).training_file)
    place.store.files.path(place.store.files.get(OWNER, place.job(lost).training_file)).unlink()
    for job_id, code in ((deleted, "file_not_found"), (lost, "file_content_missing")):
        place.worker().work()
        job = place.job(job_id)
        assert job.status == "failed"
        assert job.error is not None
        assert (job.error["code"], job.error["param"]) == (code, "training_file")
        assert job.training_file in job.error["message"]


def test_a_job_made_for_another_base_fails_and_says_so(place: Workplace) -> None:
    job_id = place.create()
    changed = replace(place.base, fingerprint=place.base.fingerprint.model_copy(update={"weights_hash": "other"}))
    place.worker("a", base=changed).work()
    job = place.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], job.error["param"]) == ("failed", "fingerprint_mismatch", "model")
    assert "weights_hash" in job.error["message"]
    place.jobs.retry(OWNER, job_id)
    place.worker("b").work()
    assert place.job(job_id).status == "succeeded", "the right base is back"


def test_a_job_that_ends_every_worker_is_given_up(hasty: Workplace) -> None:
    job_id = hasty.create()
    worker = hasty.worker()
    for _ in range(MAX_ATTEMPTS):
        worker.take()
        time.sleep(1e-5)
    worker.work()
    error = hasty.job(job_id).error
    assert error is not None
    assert error["code"] == "worker_lost"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_fails_the_job_with_its_previous_checkpoint_intact(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    job_id = place.create()
    put_folder = place.store.blobs._copy

    def full(source: Path, target: str) -> None:
        if f"checkpoint-{2 * CHECKPOINT_STEPS}-" in target and target.endswith(".safetensors"):
            raise OSError(code, "no room")
        put_folder(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(place.store.blobs, "_copy", full)
        place.worker().work()
    job = place.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"]) == ("failed", "storage_full")
    left = [key.rsplit("/", 1)[-1] for key in place.store.blobs.children(f"jobs/{job_id}")]
    assert [name.rsplit("-", 1)[0] for name in left] == [f"checkpoint-{CHECKPOINT_STEPS}", "training.jsonl"]
    place.jobs.retry(OWNER, job_id)
    place.worker().work()
    assert place.job(job_id).status == "succeeded"
    assert place.steps(job_id)[2 * CHECKPOINT_STEPS] == CHECKPOINT_STEPS + 1


def test_ended_jobs_make_room_for_others_and_living_ones_do_not(tiny_llama_folder: Path, tmp_path: Path) -> None:
    place = Workplace(tiny_llama_folder, tmp_path, max_jobs_bytes=1000)
    worker = place.worker()
    ended, living = place.create("ended"), place.create("living")

    def write(lease: Lease[Job], step: int, size: int) -> None:
        worker.files.write_checkpoint(lease, step, {}, lambda folder: fill(folder, size))

    write(worker.take(), 1, 600)
    place.jobs.cancel(OWNER, ended)
    lease = worker.take()
    write(lease, 1, 300)
    assert place.kept() == [ended, living]
    write(lease, 2, 300)
    assert place.kept() == [living], "the one that has ended had to go"
    with pytest.raises(QuotaExceeded, match="max_jobs_bytes"):
        write(lease, 3, 500)
    newest = worker.files.newest_checkpoint(lease)
    assert newest is not None
    assert (newest.name.split("-")[1], (newest / "f").stat().st_size) == ("2", 300), "the one before is whole"
    place.jobs.retry(OWNER, ended)
    assert worker.files.newest_checkpoint(worker.take()) is None, "it begins again"


def test_a_job_for_which_there_is_no_room_fails_and_says_so(tiny_llama_folder: Path, tmp_path: Path) -> None:
    place = Workplace(tiny_llama_folder, tmp_path, max_jobs_bytes=1)
    job_id = place.create()
    place.worker().work()
    job = place.job(job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], place.kept()) == ("failed", "storage_quota_exceeded", [])


def test_files_of_ended_jobs_go_when_their_time_is_up_and_those_of_others_stay(
    tiny_llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Workplace(tiny_llama_folder, tmp_path)
    ended, paused = place.create("ended"), place.create("paused")
    for job_id, stop in ((ended, place.jobs.cancel), (paused, place.jobs.pause)):
        with monkeypatch.context() as patch:
            on_step(patch, 6, lambda stop=stop, job_id=job_id: stop(OWNER, job_id))  # type: ignore[misc]
            place.worker().work()
    assert place.worker().files.sweep() == []
    later = Workplace(tiny_llama_folder, tmp_path, keep_jobs_s=0)
    assert later.worker().files.sweep() == [ended]
    assert later.kept() == [paused]
    assert all(not row.kept for row in later.repository.checkpoints(ended))
    later.jobs.resume(OWNER, paused)
    later.worker().work()
    assert later.job(paused).status == "succeeded"


def test_the_first_event_is_that_the_job_was_created(place: Workplace) -> None:
    events, more = place.jobs.events(OWNER, place.create(), after=None, limit=10)
    assert [event.message.split()[0] for event in events] == ["Created"]
    assert not more


def test_jobs_are_listed_newest_first(place: Workplace) -> None:
    created = [place.create() for _ in range(8)]
    assert [job.id for job in place.jobs.list_page(OWNER, after=None, limit=20)[0]] == created[::-1]


def fill(folder: Path, size: int) -> None:
    """A checkpoint of so many bytes."""
    (folder / "f").write_bytes(bytes(size))


def breaks_off(*_: object, **__: object) -> None:
    """A write that finds the database gone."""
    raise OperationalError("UPDATE", {}, Exception("connection lost"))


def sweeps() -> int:
    """Sweeps in memory, with their trainers."""
    gc.collect()
    return sum(type(found) is Sweep for found in gc.get_objects())


def arenas() -> int:
    """Places in memory that keep what examples have in common in all steps."""
    gc.collect()
    return sum(type(found) is Arena for found in gc.get_objects())


def on_step(patch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something while the trainer does a step."""
    advance = Sweep.advance

    def with_act(sweep: Sweep) -> Any:
        metrics = advance(sweep)
        if metrics.step == step:
            act()
        return metrics

    patch.setattr(Sweep, "advance", with_act)
