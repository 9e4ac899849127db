"""The bank: its eviction order, and costs that do not depend on the number of hot interventions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from engine_oracle import random_edit, save_edits, save_random
from hypothesis import given
from hypothesis import strategies as st

from reftserve.interventions import Intervention, PlacedEdit, Positions, load_artifact
from reftserve.server.engine.bank import Bank

HIDDEN = 32


def make_bank(rows: int) -> Bank:
    return Bank(HIDDEN, max_bytes=rows * 4 * (2 * HIDDEN + 2), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[Intervention]:
    root = tmp_path_factory.mktemp("small")
    folders = [save_random(root / str(i), [(0, "f2"), (1, "l1")], rank=i + 1, seed=i) for i in range(4)]
    return [load_artifact(folder) for folder in folders]


def lines_run(function: Callable[[], Any]) -> int:
    """Count the lines of Python that a call runs: its cost apart from array operations."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def test_a_swap_and_a_hit_cost_the_same_with_a_thousand_hot_interventions_as_with_ten(tmp_path: Path) -> None:
    hot = [load_artifact(save_random(tmp_path / str(i), [(0, "l1")], rank=1, seed=i)) for i in range(1001)]
    assert swap_and_hit_lines(hot[:10], hot[1000]) == swap_and_hit_lines(hot[:1000], hot[1000])


def swap_and_hit_lines(hot: list[Intervention], new: Intervention) -> list[int]:
    bank = make_bank(len(hot) + 1)
    for intervention in hot:
        assert bank.acquire(((intervention, 1.0),))
    for intervention in hot:
        bank.release(((intervention, 1.0),))
    hit, swap = ((hot[len(hot) // 2], 1.0),), ((new, 1.0),)
    lines = [lines_run(partial(use, uses)) for use in (bank.acquire, bank.release) for uses in (hit, swap)]
    assert bank.rows_used == len(hot), "something made room"
    return lines


def test_the_least_recently_used_is_evicted_first_and_a_running_one_never(small: list[Intervention]) -> None:
    bank = make_bank(1 + 2 + 4 + 6)
    two, four, six, eight = (((intervention, 1.0),) for intervention in small)
    for uses in (two, four, six):
        assert bank.acquire(uses)
    assert bank.acquire(eight) is None, "all rows are in use"
    bank.release(four)
    assert bank.acquire(eight) is None
    bank.release(two)
    bank.release(six)
    rows = bank.acquire(two)[0].rows  # type: ignore[index]
    bank.release(two)
    assert bank.acquire(eight), "four and six make room"
    assert bank.rows_used == 2 + 8
    assert bank.acquire(two)[0].rows is rows, "two was used last and stayed"  # type: ignore[index]


@given(moves=st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40))
def test_running_interventions_have_separate_rows_that_hold_their_weights(
    small: list[Intervention], moves: list[tuple[int, bool]]
) -> None:
    bank = make_bank(14)
    running: dict[int, Any] = {}
    for index, begins in moves:
        use = ((small[index], 0.5),)
        if not begins and index in running:
            bank.release(use)
            del running[index]
        elif begins and index not in running:
            uses = bank.acquire(use)
            free = 13 - sum(small[i].columns.rank for i in running)
            assert (uses is None) == (free < small[index].columns.rank)
            if uses is not None:
                running[index] = uses
        rows = [row for uses in running.values() for use in uses for row in use.rows.flat]
        assert len(set(rows)) == len(rows)
        assert 0 not in rows
        for i, uses in running.items():
            for use, placed in zip(uses, small[i].edits, strict=True):
                assert (use.layers, use.positions) == ((placed.layer,), placed.positions)
                assert torch.equal(bank.A[use.rows[0]], placed.edit.A)
                assert torch.equal(bank.U[use.rows[0]], placed.edit.U)
                assert torch.equal(bank.b[use.rows[0]], placed.edit.b)
                assert np.array_equal(use.scales[0], 0.5 * placed.edit.scale.numpy())
    assert not bank.A[0].any()
    assert not bank.U[0].any()


def test_equal_sites_at_many_layers_are_one_span_and_twins_at_one_layer_are_two(tmp_path: Path) -> None:
    l1, f2 = Positions.parse("l1"), Positions.parse("f2")
    places = [(0, l1, 2), (0, l1, 2), (0, f2, 1), (1, l1, 2), (2, f2, 1), (2, l1, 3)]
    edits = [PlacedEdit(layer, p, random_edit(rank, HIDDEN, seed)) for seed, (layer, p, rank) in enumerate(places)]
    intervention = load_artifact(save_edits(tmp_path / "a", edits))
    bank = make_bank(40)
    uses = bank.acquire(((intervention, 1.0),))
    assert uses is not None
    assert [(use.layers, use.positions, use.rows.shape) for use in uses] == [
        ((0, 1), l1, (2, 2)),
        ((0,), l1, (1, 2)),
        ((0, 2), f2, (2, 1)),
        ((2,), l1, (1, 3)),
    ]
    assert torch.equal(bank.A[uses[0].rows[1]], edits[3].edit.A)
    assert torch.equal(bank.A[uses[1].rows[0]], edits[1].edit.A)
    assert torch.equal(bank.A[uses[2].rows[1]], edits[4].edit.A)
