"""Runs that another server resumes, and servers that share a database."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, NoReturn

import pytest
from evaluators import OWNER, EvalWorkspace
from sqlalchemy.exc import OperationalError

from reftserve.server.errors import StorageFull
from reftserve.server.evaluation.items import ItemOutcome
from reftserve.server.evaluation.run_repository import RunRepository
from reftserve.server.storage import outages
from reftserve.server.storage.leases import LeaseLost, Leases, worker_id
from reftserve.server.storage.tables import EvalRun


@pytest.fixture
def workspace(tiny_llama_folder: Path, tmp_path: Path) -> EvalWorkspace:
    return EvalWorkspace(tiny_llama_folder, tmp_path)


@pytest.mark.parametrize(
    "change", [{"weights_hash": "other"}, {"num_layers": 5}, {"dtype": "bfloat16"}, {"quantization": "int8"}]
)
def test_a_run_made_for_another_base_fails_and_names_the_difference(
    workspace: EvalWorkspace, change: dict[str, object]
) -> None:
    run = workspace.created(3)
    workspace.change(run, status="in_progress", started_at=1)
    ended = workspace.execute(run, workspace.evaluator(workspace.served.model_copy(update=change)))
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "fingerprint_mismatch")
    (field,) = change
    assert field in ended.error["message"]
    assert workspace.items(run) == workspace.engine.asked == []


def test_a_run_resumes_on_the_base_it_was_made_for(workspace: EvalWorkspace) -> None:
    run = workspace.created(3)
    assert run.served == {**workspace.base.fingerprint.model_dump(), "dtype": "float32", "quantization": "none"}
    assert workspace.execute(run, workspace.evaluator()).status == "completed"
    assert [item.number for item in workspace.items(run)] == [0, 1, 2]


def test_a_run_without_a_recorded_base_resumes(workspace: EvalWorkspace) -> None:
    run = workspace.created(3)
    workspace.change(run, served=None)
    other = workspace.served.model_copy(update={"dtype": "bfloat16"})
    assert workspace.execute(run, workspace.evaluator(other)).status == "completed"


def test_only_one_of_two_servers_works_on_a_run(workspace: EvalWorkspace) -> None:
    run = workspace.created(100)
    assert workspace.execute(run, workspace.evaluator(), workspace.evaluator()).status == "completed"
    assert sorted(workspace.engine.asked) == sorted(f"{run.id}-{number}-scored-0" for number in range(100))


def test_a_server_that_stops_frees_its_run_for_the_next_server(workspace: EvalWorkspace) -> None:
    first, second = (Leases(workspace.store.database, EvalRun, worker_id(), lease_s=60) for _ in range(2))
    workspace.created(3)
    assert first.take() is not None
    assert second.take() is None
    first.release()
    assert second.take() is not None
    assert first.take() is None


def test_a_run_of_a_silent_server_goes_to_another_and_only_that_one_writes(workspace: EvalWorkspace) -> None:
    silent, other = (Leases(workspace.store.database, EvalRun, worker_id(), lease_s=60) for _ in range(2))
    repository = RunRepository(workspace.store.database)
    run = workspace.created(3)
    old = silent.take()
    assert old is not None
    workspace.change(run, lease_expires_at=1.0)
    silent.renew()
    assert other.take() is None, "a sign of life in time"
    workspace.change(run, lease_expires_at=1.0)
    new = other.take()
    assert new is not None
    silent.renew()
    silent.release()
    for write in (lambda: repository.end(old), lambda: repository.add(old, [], [ItemOutcome(0, {})])):
        with pytest.raises(LeaseLost, match=r"lease on .* is lost"):
            write()
    repository.add(new, [], [ItemOutcome(0, {})])
    assert (workspace.row(run).status, len(workspace.items(run))) == ("in_progress", 1)
    repository.end(new)
    assert workspace.row(run).status == "completed"


def test_nothing_is_written_to_a_cancelled_or_deleted_run(workspace: EvalWorkspace) -> None:
    repository = RunRepository(workspace.store.database)
    for end in (workspace.evals.cancel_run, workspace.evals.delete_run):
        run = workspace.created(3)
        lease = Leases(workspace.store.database, EvalRun, worker_id(), lease_s=60).take()
        assert lease is not None
        end(OWNER, run.eval_id, run.id)
        with pytest.raises(LeaseLost):
            repository.add(lease, [], [ItemOutcome(0, {})])


def test_a_run_waits_for_room_on_a_full_disk(workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "FIRST_PAUSE_S", 0.01)
    add, refused = RunRepository.add, []

    def full_once(repository: RunRepository, *arguments: Any) -> None:
        if not refused:
            refused.append(arguments)
            raise StorageFull("full")
        add(repository, *arguments)

    monkeypatch.setattr(RunRepository, "add", full_once)
    run = workspace.created(3)
    assert (workspace.execute(run, workspace.evaluator()).status, len(refused)) == ("completed", 1)


def test_an_evaluator_that_is_cancelled_while_the_database_is_away_ends_as_cancelled(
    workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any, **__: Any) -> NoReturn:
        raise OperationalError("BEGIN", None, Exception("away"))

    monkeypatch.setattr(Leases, "release", away)

    async def cancelled() -> None:
        task = asyncio.create_task(workspace.evaluator().run_forever())
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())


def test_a_run_that_repeatedly_kills_its_servers_fails(workspace: EvalWorkspace) -> None:
    run = workspace.created(3)
    workspace.change(run, attempts=20)
    ended = workspace.execute(run, workspace.evaluator())
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "worker_lost")
