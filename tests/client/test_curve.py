"""Curves in text, by what is seen of them."""

from __future__ import annotations

from itertools import pairwise

from reftserve.client.curve import MARK, draw

EMPTY = "\u2800"


def plotted(lines: list[str]) -> list[str]:
    """The characters of the plot, without labels."""
    return [line[9:] for line in lines[:-1]]


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    lines = draw({step: 100.0 - step for step in range(100)}, {}, width=29, height=5)
    plot = plotted(lines)
    assert [len(row) for row in plot] == [20] * 5
    filled = [[index for index, cell in enumerate(row) if cell != EMPTY] for row in plot]
    assert filled[0][0] == 0
    assert filled[-1][-1] == 19
    assert {index for row in filled for index in row} == set(range(20))
    for upper, lower in pairwise(filled):
        assert upper[-1] <= lower[0] <= upper[-1] + 1, "joined, and never back"


def test_the_scale_is_written_at_its_ends() -> None:
    lines = draw({10: 2.5, 400: 0.125}, {}, width=40, height=4)
    assert lines[0].split()[0] == "2.5"
    assert lines[3].split()[0] == "0.125"
    assert lines[4].split() == ["10", "400"]
    assert max(map(len, lines)) == 40


def test_a_jump_is_drawn_joined() -> None:
    plot = plotted(draw({0: 0.0, 1: 8.0, 2: 8.0}, {}, width=9 + 2, height=6))
    assert all(row.strip(EMPTY) for row in plot)


def test_many_values_in_a_column_show_as_their_mean() -> None:
    noisy = {step: 1.0 if step % 2 else -1.0 for step in range(4000)}
    plot = plotted(draw(noisy, {0: 1.0, 1: -1.0}, width=29, height=5))
    assert {index for index, row in enumerate(plot) if row.strip(EMPTY + MARK)} == {2}


def test_marks_stand_where_their_values_are() -> None:
    plot = plotted(draw({0: 0.0, 10: 0.0}, {0: 1.0, 10: 0.5}, width=9 + 10, height=5))
    assert plot[0][0] == MARK
    assert plot[2][9] == MARK
    assert sum(row.count(MARK) for row in plot) == 2


def test_one_value_equal_values_and_none_are_drawn_too() -> None:
    assert draw({}, {}, width=40, height=5) == []
    for line, marks in (({3: 1.0}, {}), ({}, {3: 1.0}), ({1: 0.5, 2: 0.5}, {1: 0.5})):
        assert "".join(plotted(draw(line, marks, width=12, height=3))).strip(EMPTY)
    assert draw({1: 1.0, 2: 2.0}, {}, width=1, height=1)
