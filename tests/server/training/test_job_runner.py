"""One job's run: interrupted anywhere, resumed by any worker, ended once; and every reason for failure."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from interruptions import Killed, breaks_off, kill_at_step, on_step
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session
from workspace import OWNER, STEPS, Workspace

from reftserve.interventions import load_artifact
from reftserve.server.registry.names import Reference
from reftserve.server.storage.leases import MAX_ATTEMPTS, LeaseLost
from reftserve.server.storage.tables import Version
from reftserve.server.training.job_repository import JobRepository
from reftserve.server.training.sweep import Sweep
from reftserve.server.training.varlen import VarlenModel


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
    assert expiring.store.files.list_page(OWNER, purpose="fine-tune-results") == ([], False)
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
    results, _ = expiring.store.files.list_page(OWNER, purpose="fine-tune-results")
    assert [file.id for file in results] == job.result_files
    assert expiring.steps(job_id) == list(range(1, STEPS + 1)), "no step was done again"


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


def test_the_first_event_reports_the_jobs_creation(workspace: Workspace) -> None:
    events, more = workspace.jobs.events(OWNER, workspace.create(), after=None, limit=10)
    assert [event.message.split()[0] for event in events] == ["Created"]
    assert not more


def test_jobs_are_listed_newest_first(workspace: Workspace) -> None:
    created = [workspace.create() for _ in range(8)]
    assert [job.id for job in workspace.jobs.list_page(OWNER, after=None, limit=20)[0]] == created[::-1]
