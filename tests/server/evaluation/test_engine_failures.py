"""Items that end the engine: each is tried twice, the second time alone; the run's other items lose nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluators import EvalWorkspace

from reftserve.server.errors import EngineFailed, Unavailable
from reftserve.server.evaluation import evaluator
from reftserve.server.evaluation.evaluator import MAX_FATAL_ITEMS
from reftserve.server.evaluation.items import evaluate
from reftserve.server.storage.leases import Lease, Leases
from reftserve.server.storage.tables import EvalRun


@pytest.fixture
def workspace(tiny_llama_folder: Path, tmp_path: Path) -> EvalWorkspace:
    return EvalWorkspace(tiny_llama_folder, tmp_path)


def engine_that(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int, list[int]], Exception | None]) -> list[int]:
    """Let evaluations of items fail as `fails` says, from the item and those running beside it. Returns all tries."""
    tried: list[int] = []
    running: list[int] = []

    async def tries(inference: Any, target: Any, number: int, example: Any) -> Any:
        tried.append(number)
        running.append(number)
        await asyncio.sleep(0.01)  # the rest of the chunk begins
        failure = fails(number, running)
        await asyncio.sleep(0.01)  # the rest of the chunk looks at what runs
        running.remove(number)
        if failure is not None:
            raise failure
        return await evaluate(inference, target, number, example)

    monkeypatch.setattr(evaluator, "evaluate", tries)
    return tried


def test_an_item_that_ends_the_engine_gets_an_error_and_the_others_their_scores(
    workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends_with_item_2(number: int, running: list[int]) -> Exception | None:
        return EngineFailed("the engine ended with code 1") if 2 in running else None

    tried = engine_that(monkeypatch, ends_with_item_2)
    run = workspace.created(5)
    ended = workspace.execute(run, workspace.evaluator())
    assert ended.status == "completed"
    assert [item.status for item in workspace.items(run)] == ["pass", "pass", "error", "pass", "pass"]
    error = workspace.items(run)[2].error
    assert error == {"code": "engine_failed", "message": "the engine ended with code 1"}
    assert sorted(tried) == sorted([0, 1, 2, 3, 4] * 2), "nobody is tried a third time"


def test_a_run_with_many_fatal_items_fails_instead_of_ending_the_engine_again_and_again(
    workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = engine_that(monkeypatch, lambda *_: EngineFailed("the engine ended", code="engine_died"))
    run = workspace.created(100)
    ended = workspace.execute(run, workspace.evaluator())
    assert ended.error is not None
    assert (ended.status, ended.error["code"]) == ("failed", "engine_died")
    assert "items 0, 1, 2" in ended.error["message"]
    assert len(tried) == evaluator.CHUNK_ITEMS + MAX_FATAL_ITEMS


def test_items_whose_engine_was_gone_before_it_took_them_are_tried_again(
    workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[int] = []

    def first_time(number: int, running: list[int]) -> Exception | None:
        if number in (1, 3) and gone.count(number) < 2:
            gone.append(number)
            return Unavailable("the engine ended", code="engine_died")
        return None

    tried = engine_that(monkeypatch, first_time)
    run = workspace.created(5)
    assert workspace.execute(run, workspace.evaluator()).status == "completed"
    assert [item.status for item in workspace.items(run)] == ["pass"] * 5
    assert sorted(tried) == [0, 1, 1, 1, 2, 3, 3, 3, 4]


def test_a_server_stopped_while_it_takes_a_run_leaves_it_to_the_next_server(
    workspace: EvalWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workspace.created(3)
    taking, go_on = threading.Event(), threading.Event()
    take = Leases.take

    def slow_take(leases: Leases[EvalRun]) -> Lease[EvalRun] | None:
        taking.set()
        go_on.wait(10)
        return take(leases)

    async def stopped() -> None:
        task = asyncio.create_task(workspace.evaluator().run_forever())
        await asyncio.to_thread(taking.wait, 10)
        task.cancel()
        await asyncio.sleep(0.1)
        go_on.set()
        await asyncio.gather(task, return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(Leases, "take", slow_take)
        asyncio.run(stopped())
    assert workspace.row(run).lease_worker is None, "free at once, not when the lease expires"
    assert workspace.row(run).attempts == 0
    assert workspace.execute(run, workspace.evaluator()).status == "completed"
