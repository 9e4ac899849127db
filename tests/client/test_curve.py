"""Curves drawn as text."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest

from reftserve.client.curve import MARK, draw


def plotted(lines: list[str]) -> list[str]:
    return [line.rstrip()[:-1].replace("┤", "│").split("│", 1)[1] for line in lines if line.rstrip().endswith("│")]


def is_line(character: str) -> bool:
    return 0x2800 < ord(character) <= 0x28FF


def test_a_falling_line_goes_from_the_upper_left_to_the_lower_right() -> None:
    plot = plotted(draw({step: 100.0 - step for step in range(100)}, {}, width=29, height=8))
    width = len(plot[0])
    assert [len(row) for row in plot] == [width] * 5
    filled = [[index for index, cell in enumerate(row) if is_line(cell)] for row in plot]
    assert filled[0][0] == 0
    assert filled[-1][-1] == width - 1
    assert {index for row in filled for index in row} == set(range(width))
    for upper, lower in pairwise(filled):
        assert upper[-1] <= lower[0] <= upper[-1] + 1, "joined, and never back"


@pytest.mark.parametrize("width", [20, 80])
def test_the_scale_is_written_at_its_ends_and_the_width_is_kept(width: int) -> None:
    lines = draw({10: 2.5, 400: 0.125}, {}, width=width, height=7)
    assert lines[1].split("┤")[0].strip() == "2.5"
    assert lines[4].split("┤")[0].strip() == "0.125"
    assert lines[6].split() == ["10", "400"]
    assert [len(line) for line in lines] == [width] * 7


def test_a_jump_is_drawn_as_a_connected_line() -> None:
    plot = plotted(draw({0: 0.0, 1: 8.0, 2: 8.0}, {}, width=20, height=9))
    assert all(any(map(is_line, row)) for row in plot)


def test_several_values_in_one_column_are_drawn_as_their_mean() -> None:
    noisy = {step: 1.0 if step % 2 else -1.0 for step in range(4000)}
    plot = plotted(draw(noisy, {0: 1.0, 1: -1.0}, width=29, height=8))
    assert {index for index, row in enumerate(plot) if any(map(is_line, row))} == {2}


def test_marks_are_drawn_at_their_values() -> None:
    plot = plotted(draw({0: 0.0, 10: 0.0}, {0: 1.0, 10: 0.5}, width=20, height=8))
    assert plot[0][0] == MARK
    assert plot[2][-1] == MARK
    assert sum(row.count(MARK) for row in plot) == 2


def test_one_value_and_equal_values_are_drawn_too() -> None:
    for line, marks in (({3: 1.0}, {}), ({}, {3: 1.0}), ({1: 0.5, 2: 0.5}, {1: 0.5})):
        assert "".join(plotted(draw(line, marks, width=20, height=6))).strip()


def test_without_values_or_space_nothing_is_drawn() -> None:
    assert draw({}, {}, width=40, height=8) == []
    assert draw({1: 1.0, 2: 2.0}, {}, width=80, height=1) == []
    assert draw({1: 1.0, 2: 2.0}, {}, width=1, height=8) == []


def test_the_command_line_starts_without_the_plotting_library_and_plots_without_numpy() -> None:
    code = "import sys, reftserve.client.cli; assert 'plotext' not in sys.modules\n"
    code += "from reftserve.client.curve import draw; draw({1: 1.0}, {}, 40, 8); assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
