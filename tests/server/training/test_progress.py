"""Progress: one event a second at most, no step lost from the series, and a number of events that time bounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from interruptions import kill_at_step
from workspace import STEPS, Workspace

from reftserve.client.schemas import FineTuningEvent
from reftserve.server.api.fine_tuning import _event
from reftserve.server.training import progress
from reftserve.server.training.progress import Progress

DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def each_step_is_an_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the real interval, which the folder's other tests set to 0."""
    monkeypatch.setattr(progress, "INTERVAL_S", 1.0)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float | None = 0.5) -> dict[str, Any]:
    return {"step": number, "train_loss": loss, "learning_rate": 0.1, "tokens_per_second": 9.0}


def events(workspace: Workspace, job_id: str) -> list[FineTuningEvent]:
    rows = workspace.repository.events(job_id, before=None, limit=10**6)
    return [_event(row) for row in reversed(rows) if row.type == "metrics"]


def test_steps_within_a_second_share_an_event(workspace: Workspace) -> None:
    job_id, clock = workspace.create(), Clock()
    written = Progress(workspace.repository, workspace.worker().take(), clock)
    for number in range(1, 27):
        written.add(step(number), total_steps=30, eta_s=30.0 - number)
        clock.now += 0.125
    written.flush()
    found = events(workspace, job_id)
    assert [[each["step"] for each in event.steps] for event in found] == [
        [1],
        list(range(2, 10)),
        list(range(10, 18)),
        list(range(18, 26)),
        [26],
    ]
    assert (found[1].data or {})["step"] == 9, "the event itself reports the newest step"
    assert all({"total_steps", "eta_s", "train_loss"} <= each.keys() for event in found for each in event.steps)
    assert [each["step"] for each in workspace.repository.steps(job_id)] == list(range(1, 27))
    written.flush()
    assert len(events(workspace, job_id)) == len(found), "nothing is pending"


def test_the_events_of_a_day_of_fast_steps_are_bounded(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, rows = Clock(), list[int]()
    monkeypatch.setattr(workspace.repository, "progress", lambda *_, **__: rows.append(1))
    workspace.create()
    written = Progress(workspace.repository, workspace.worker().take(), clock)
    while clock.now < DAY_S:
        written.add(step(1), total_steps=1, eta_s=0)
        clock.now += 0.5
    assert 1000 < len(rows) < 6000, "instead of 86,400"


def test_a_loss_that_is_no_number_is_null_and_said_in_words(workspace: Workspace) -> None:
    job_id = workspace.create()
    written = Progress(workspace.repository, workspace.worker().take())
    written.add(step(1, None), total_steps=2, eta_s=1)
    (event,) = events(workspace, job_id)
    assert event.message == "Step 1/2: training loss not finite"


def test_a_resumed_job_has_the_steps_of_its_checkpoint_that_no_event_had(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = expiring.create()
    with monkeypatch.context() as patch:
        patch.setattr(progress, "INTERVAL_S", 1000.0)
        kill_at_step(expiring.worker("a"), patch, step=6)
    assert expiring.steps(job_id) == [1], "steps 2 to 4 are in the checkpoint, 5 and 6 are lost"
    expiring.worker("b").work()
    assert expiring.steps(job_id) == list(range(1, STEPS + 1))
    (result,) = expiring.job(job_id).result_files
    file = expiring.store.files.path(expiring.store.files.get("default", result))
    assert len(Path(file).read_text().splitlines()) == 1 + STEPS


def test_a_job_writes_few_events_for_many_steps(workspace: Workspace) -> None:
    job_id = workspace.create(hyperparameters={"n_epochs": 20})
    workspace.worker().work()
    assert workspace.job(job_id).status == "succeeded"
    assert workspace.steps(job_id) == list(range(1, 10 * STEPS + 1))
    assert len(events(workspace, job_id)) < 5 * STEPS
