"""Runs that go on in another server than they began in, and servers that share a database."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluators import OWNER, EvalPlace

from reftserve.server.evaluation.items import ItemOutcome
from reftserve.server.evaluation.run_repository import RunRepository
from reftserve.server.storage.leases import LeaseLost, Leases, worker_id
from reftserve.server.storage.tables import EvalRun


@pytest.fixture
def place(tiny_llama_folder: Path, tmp_path: Path) -> EvalPlace:
    return EvalPlace(tiny_llama_folder, tmp_path)


@pytest.mark.parametrize(
    "change", [{"weights_hash": "other"}, {"num_layers": 5}, {"dtype": "bfloat16"}, {"quantization": "int8"}]
)
def test_a_run_made_for_another_base_fails_and_says_what_differs(place: EvalPlace, change: dict[str, object]) -> None:
    run = place.created(3)
    place.change(run, status="in_progress", started_at=1)
    ended = place.execute(run, place.evaluator(place.served.model_copy(update=change)))
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "fingerprint_mismatch")
    (field,) = change
    assert field in ended.error["message"]
    assert place.items(run) == place.engine.asked == []


def test_a_run_goes_on_with_the_base_that_it_was_made_for(place: EvalPlace) -> None:
    run = place.created(3)
    assert run.served == {**place.base.fingerprint.model_dump(), "dtype": "float32", "quantization": "none"}
    assert place.execute(run, place.evaluator()).status == "completed"
    assert [item.number for item in place.items(run)] == [0, 1, 2]


def test_a_run_from_before_bases_were_recorded_goes_on(place: EvalPlace) -> None:
    run = place.created(3)
    place.change(run, served=None)
    other = place.served.model_copy(update={"dtype": "bfloat16"})
    assert place.execute(run, place.evaluator(other)).status == "completed"


def test_of_two_servers_one_is_at_a_run(place: EvalPlace) -> None:
    run = place.created(100)
    assert place.execute(run, place.evaluator(), place.evaluator()).status == "completed"
    assert sorted(place.engine.asked) == sorted(f"{run.id}-{number}-scored-0" for number in range(100))


def test_a_server_that_stops_leaves_its_run_to_the_next(place: EvalPlace) -> None:
    first, second = (Leases(place.store.database, EvalRun, worker_id(), lease_s=60) for _ in range(2))
    place.created(3)
    assert first.take() is not None
    assert second.take() is None
    first.release()
    assert second.take() is not None
    assert first.take() is None


def test_a_run_of_a_server_that_is_silent_goes_to_another_which_alone_writes(place: EvalPlace) -> None:
    silent, other = (Leases(place.store.database, EvalRun, worker_id(), lease_s=60) for _ in range(2))
    repository = RunRepository(place.store.database)
    run = place.created(3)
    old = silent.take()
    assert old is not None
    place.change(run, lease_expires_at=1.0)
    silent.renew()
    assert other.take() is None, "a sign of life in time"
    place.change(run, lease_expires_at=1.0)
    new = other.take()
    assert new is not None
    silent.renew()
    silent.release()
    for write in (lambda: repository.end(old), lambda: repository.add(old, [], [ItemOutcome(0, {})])):
        with pytest.raises(LeaseLost, match="changed hands"):
            write()
    repository.add(new, [], [ItemOutcome(0, {})])
    assert (place.row(run).status, len(place.items(run))) == ("in_progress", 1)
    repository.end(new)
    assert place.row(run).status == "completed"


def test_nothing_is_written_to_a_run_that_was_cancelled_or_deleted(place: EvalPlace) -> None:
    repository = RunRepository(place.store.database)
    for end in (place.evals.cancel_run, place.evals.delete_run):
        run = place.created(3)
        lease = Leases(place.store.database, EvalRun, worker_id(), lease_s=60).take()
        assert lease is not None
        end(OWNER, run.eval_id, run.id)
        with pytest.raises(LeaseLost):
            repository.add(lease, [], [ItemOutcome(0, {})])


def test_a_run_that_ends_its_servers_again_and_again_fails(place: EvalPlace) -> None:
    run = place.created(3)
    place.change(run, attempts=20)
    ended = place.execute(run, place.evaluator())
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "worker_lost")
