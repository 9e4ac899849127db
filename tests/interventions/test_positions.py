"""Positions: the paper's notation and the tokens that it selects."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reftserve.interventions import Positions, PositionsError

prompts = st.integers(1, 40)
ends = st.builds(Positions, first=st.integers(0, 9), last=st.integers(1, 9))
anything = st.one_of(ends, st.sampled_from(["prompt", "generated", "all"]).map(Positions.parse))


@pytest.mark.parametrize(
    ("text", "n_prompt", "length", "expected"),
    [
        ("f2+l2", 10, 12, [0, 1, 8, 9]),
        ("f7+l7", 10, 12, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("f7+l7", 9, 12, [0, 1, 2, 3, 5, 6, 7, 8]),
        ("f7+l7", 3, 5, [0, 2]),
        ("f7+l7", 1, 4, [0]),
        ("f7", 1, 4, []),
        ("f0+l1", 5, 9, [4]),
        ("l1", 1, 3, [0]),
        ("f3", 8, 9, [0, 1, 2]),
        ("prompt", 3, 5, [0, 1, 2]),
        ("generated", 3, 5, [3, 4]),
        ("all", 3, 5, [0, 1, 2, 3, 4]),
    ],
)
def test_each_notation_selects_its_tokens(text: str, n_prompt: int, length: int, expected: list[int]) -> None:
    assert Positions.parse(text).indices(n_prompt, 0, length).tolist() == expected


@given(positions=anything, n_prompt=prompts, extra=st.integers(0, 20), cuts=st.lists(st.integers(0, 60), max_size=5))
def test_each_token_is_selected_once_under_any_chunking(
    positions: Positions, n_prompt: int, extra: int, cuts: list[int]
) -> None:
    length = n_prompt + extra
    bounds = [0, *sorted(min(cut, length) for cut in cuts), length]
    chunked = [i for a, b in itertools.pairwise(bounds) for i in positions.indices(n_prompt, a, b)]
    whole = positions.indices(n_prompt, 0, length).tolist()
    assert chunked == whole == sorted(set(whole))


@given(positions=ends, n_prompt=prompts)
def test_prefix_and_suffix_never_overlap_and_split_covers_both(positions: Positions, n_prompt: int) -> None:
    parts = [part.indices(n_prompt, 0, n_prompt).tolist() for part in positions.split()]
    assert [*itertools.chain(*parts)] == positions.indices(n_prompt, 0, n_prompt).tolist()


@given(n_prompt=prompts)
def test_l1_is_the_last_prompt_token_of_every_prompt(n_prompt: int) -> None:
    assert Positions.parse("l1").indices(n_prompt, 0, n_prompt + 3).tolist() == [n_prompt - 1]


@given(positions=anything)
def test_the_canonical_text_parses_to_the_same_positions(positions: Positions) -> None:
    assert Positions.parse(str(positions)) == positions


@pytest.mark.parametrize(
    "text", ["", "f", "l", "+l1", "f-1", "f1+f2", "l1+f1", "f0", "f0+l0", "F1", "f1 +l1", "f9999999"]
)
def test_invalid_notation_is_refused(text: str) -> None:
    with pytest.raises(PositionsError, match="positions"):
        Positions.parse(text)
