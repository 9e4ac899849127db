"""Runs that go on in another server than they began in, and servers that share a database."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluators import EvalPlace

from reftserve.server.evaluation.items import ItemOutcome
from reftserve.server.evaluation.run_repository import RunRepository


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
    assert sorted(place.engine.asked) == sorted(f"{run.id}-{number}-scored" for number in range(100))


def test_a_server_that_stops_leaves_its_run_to_the_next(place: EvalPlace) -> None:
    first, second = (RunRepository(place.store.database, lease_s=60) for _ in range(2))
    place.created(3)
    assert first.next_run() is not None
    assert second.next_run() is None
    first.release()
    assert second.next_run() is not None
    assert first.next_run() is None


def test_a_run_of_a_server_that_is_silent_goes_to_another_which_alone_writes(place: EvalPlace) -> None:
    silent, other = (RunRepository(place.store.database, lease_s=60) for _ in range(2))
    run = place.created(3)
    assert silent.next_run() is not None
    place.change(run, lease_expires_at=1.0)
    silent.renew()
    assert other.next_run() is None, "a sign of life in time"
    place.change(run, lease_expires_at=1.0)
    assert other.next_run() is not None
    silent.renew()
    silent.release()
    silent.end(run.id)
    assert not silent.add(run.id, [], [ItemOutcome(0, {})])
    assert other.add(run.id, [], [ItemOutcome(0, {})])
    assert (place.row(run).status, len(place.items(run))) == ("in_progress", 1)
    other.end(run.id)
    assert place.row(run).status == "completed"
