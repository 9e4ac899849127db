"""Splits: every example is in a part, and no prompt is in two."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reftserve.server.datasets import EncodedExample, SourceLocation, Splits, split
from reftserve.server.errors import InvalidRequest

single_turns = st.builds(lambda p, c: EncodedExample((p,), (c,)), st.integers(0, 40), st.integers(0, 3))
openings = st.integers(0, 3)


def conversation(row: int, turns: list[int]) -> list[EncodedExample]:
    """Return a row in which each prompt begins with the previous one."""
    return [EncodedExample(tuple(turns[: end + 1]), (7,), SourceLocation("row", row)) for end in range(len(turns))]


def prompts(parts: Splits) -> list[set[tuple[int, ...]]]:
    return [{example.prompt_ids for example in part} for part in (parts.train, parts.validation, parts.test)]


def assert_disjoint(sets: list[set[tuple[int, ...]]]) -> None:
    assert sum(map(len, sets)) == len(set.union(*sets))


@given(training=st.lists(single_turns, min_size=10, max_size=60), seed=st.integers(0, 9))
def test_the_three_parts_cover_the_data_and_share_no_prompt(training: list[EncodedExample], seed: int) -> None:
    assume(len({example.prompt_ids for example in training}) > 2)
    parts = split(training, None, seed=seed)
    assert_disjoint(prompts(parts))
    together = parts.train + parts.validation + parts.test
    assert sorted(map(repr, together)) == sorted(map(repr, training))
    assert parts == split(training, None, seed=seed), "the same seed gives the same split"


@given(
    rows=st.lists(st.tuples(openings, st.lists(st.integers(0, 40), min_size=1, max_size=3)), min_size=20, max_size=40),
    seed=st.integers(0, 9),
)
def test_conversations_stay_whole_and_a_learned_beginning_is_not_scored(
    rows: list[tuple[int, list[int]]], seed: int
) -> None:
    assume(len({(opening, *later) for opening, later in rows}) > 5)
    training = [e for row, (opening, later) in enumerate(rows) for e in conversation(row, [opening, *later])]
    parts = split(training, None, seed=seed)
    assert_disjoint(prompts(parts))
    locations = [{example.location for example in part} for part in (parts.train, parts.validation, parts.test)]
    assert not locations[0] & locations[1]
    assert not locations[0] & locations[2]
    assert not locations[1] & locations[2]


def test_conversations_with_one_common_beginning_can_be_split() -> None:
    training = [e for row in range(30) for e in conversation(row, [1, 100 + row])]
    parts = split(training, None, seed=0)
    assert len(parts.train) > 40
    assert len(parts.validation) == len(parts.test) == 3
    assert (1,) not in prompts(parts)[1] | prompts(parts)[2], "the shared beginning is learned, so it is not scored"


def test_conversations_that_are_beginnings_of_others_are_trained_on() -> None:
    short = [e for row in range(16) for e in conversation(row, [0, 0])]
    longer = [e for row, later in enumerate(([2], [1], [0, 0], [3])) for e in conversation(20 + row, [0, *later])]
    for seed in range(20):
        parts = split(short + longer, None, seed=seed)
        assert (0, 0) in prompts(parts)[0]
        assert parts.validation
        assert parts.test


def test_validation_data_selects_with_one_half_and_scores_with_the_other() -> None:
    training = [EncodedExample((i,), (1,)) for i in range(10)]
    held_out = [EncodedExample((i,), (1,)) for i in range(5, 25)]
    parts = split(training, held_out, seed=0)
    assert parts.train == training
    assert len(parts.validation) + len(parts.test) == 15, "what is in the training data is no held-out example"
    with pytest.raises(InvalidRequest, match="two prompts"):
        split(training, training, seed=0)
    with pytest.raises(InvalidRequest, match="three different prompts"):
        split(training[:2] * 5, None, seed=0)
