"""Runs that go on in another server than they began in."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluators import EvalPlace


@pytest.fixture
def place(tiny_llama_folder: Path, tmp_path: Path) -> EvalPlace:
    return EvalPlace(tiny_llama_folder, tmp_path)


@pytest.mark.parametrize(
    "change", [{"weights_hash": "other"}, {"num_layers": 5}, {"dtype": "bfloat16"}, {"quantization": "int8"}]
)
def test_a_run_made_for_another_base_fails_and_says_what_differs(place: EvalPlace, change: dict[str, object]) -> None:
    run = place.created(3)
    place.change(run, status="in_progress", started_at=1)
    ended = place.carry(run, place.evaluator(place.served.model_copy(update=change)))
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "fingerprint_mismatch")
    (field,) = change
    assert field in ended.error["message"]
    assert place.items(run) == place.engine.asked == []


def test_a_run_goes_on_with_the_base_that_it_was_made_for(place: EvalPlace) -> None:
    run = place.created(3)
    assert run.served == {**place.base.fingerprint.model_dump(), "dtype": "float32", "quantization": "none"}
    assert place.carry(run, place.evaluator()).status == "completed"
    assert [item.number for item in place.items(run)] == [0, 1, 2]


def test_a_run_from_before_bases_were_recorded_goes_on(place: EvalPlace) -> None:
    run = place.created(3)
    place.change(run, served=None)
    other = place.served.model_copy(update={"dtype": "bfloat16"})
    assert place.carry(run, place.evaluator(other)).status == "completed"
