"""Pause, cancel and retry: at once, without an answer of the worker, and without a lost step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interruptions import arenas, on_step, sweeps
from workspace import CHECKPOINT_STEPS, OWNER, STEPS, Workspace

from reftserve.server.errors import Conflict
from reftserve.server.training.activation_cache import ActivationCache
from reftserve.server.training.sweep import Sweep


def test_a_paused_job_holds_no_memory_or_worker_and_has_the_same_result(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.create("straight")
    worker, before = workspace.worker(), (sweeps(), arenas())
    worker.work()
    job_id = workspace.create("paused")
    on_step(monkeypatch, 6, lambda: workspace.jobs.pause(OWNER, job_id))
    worker.work()
    assert (workspace.job(job_id).status, workspace.steps(job_id)[-1]) == ("paused", 6), (
        "before the next optimizer step"
    )
    assert worker.leases.take() is None
    assert sweeps() <= before[0]
    assert arenas() <= before[1], "what it kept of its examples has gone"
    assert workspace.jobs.resume(OWNER, job_id).status == "queued"
    workspace.worker("another").work()
    assert workspace.steps(job_id) == list(range(1, STEPS + 1)), "no step is lost"
    assert workspace.content_hash("paused") == workspace.content_hash("straight")


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


def test_a_queued_job_is_paused_at_once_and_a_pause_can_be_withdrawn(workspace: Workspace) -> None:
    job_id = workspace.create()
    assert workspace.jobs.pause(OWNER, job_id).status == "paused"
    assert workspace.jobs.pause(OWNER, job_id).status == "paused", "once more changes nothing"
    assert workspace.jobs.resume(OWNER, job_id).status == "validating_files"
    worker = workspace.worker()
    lease = worker.take()
    assert workspace.jobs.pause(OWNER, job_id).status == "validating_files", "until its worker has made a checkpoint"
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
    assert sweeps() <= before
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
