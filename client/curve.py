"""A curve in text: a line of braille dots, two wide and four high in each character, with marks upon it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from statistics import fmean

MARK = "●"
_LABEL_WIDTH = 8
_DOTS_WIDE, _DOTS_HIGH = 2, 4
# The bit of each dot in the code point of a braille character, by column and row.
_BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_EMPTY = 0x2800


def draw(line: Mapping[int, float], marks: Mapping[int, float], width: int, height: int) -> list[str]:
    """`height` lines of at most `width` characters, and one with the first and the last x; none without a value.

    line, marks: finite y by x. Where several values of the line share a column of dots, it shows their mean.
    """
    values = [*line.values(), *marks.values()]
    if not values:
        return []
    plot = _Plot([*line, *marks], values, max(1, width - _LABEL_WIDTH - 1), height)
    cells = [[_EMPTY] * plot.width for _ in range(height)]
    for column, row in plot.dots(line):
        cells[row // _DOTS_HIGH][column // _DOTS_WIDE] |= _BITS[column % _DOTS_WIDE][row % _DOTS_HIGH]
    drawn = [[chr(cell) for cell in row] for row in cells]
    for x, y in marks.items():
        drawn[plot.row(y) // _DOTS_HIGH][plot.column(x) // _DOTS_WIDE] = MARK
    labels = {0: f"{plot.top:.3g}", height - 1: f"{plot.bottom:.3g}"}
    lines = [f"{labels.get(index, ''):>{_LABEL_WIDTH}} {''.join(row)}" for index, row in enumerate(drawn)]
    first, last = str(plot.left), str(plot.right)
    return [*lines, f"{'':{_LABEL_WIDTH}} {first}{last:>{max(len(last) + 1, plot.width - len(first))}}"]


class _Plot:
    """Where values lie in a grid of dots; rows count from the top."""

    def __init__(self, xs: list[int], ys: list[float], width: int, height: int) -> None:
        self.width = width
        self.left, self.right = min(xs), max(xs)
        self.bottom, self.top = min(ys), max(ys)
        self._columns, self._rows = width * _DOTS_WIDE, height * _DOTS_HIGH

    def column(self, x: int) -> int:
        return round((x - self.left) / ((self.right - self.left) or 1) * (self._columns - 1))

    def row(self, y: float) -> int:
        return round((self.top - y) / ((self.top - self.bottom) or 1) * (self._rows - 1))

    def dots(self, line: Mapping[int, float]) -> Iterator[tuple[int, int]]:
        """Column and row of each dot of a line that joins the means of the columns."""
        by_column: dict[int, list[float]] = defaultdict(list)
        for x, y in line.items():
            by_column[self.column(x)].append(y)
        rows = [(column, self.row(fmean(ys))) for column, ys in sorted(by_column.items())]
        yield from rows[:1]
        for (start, high), (end, low) in pairwise(rows):
            reached = high
            for column in range(start + 1, end + 1):
                row = high + round((low - high) * (column - start) / (end - start))
                yield column, row
                # Steep parts stay joined.
                yield from ((column, between) for between in range(min(reached, row) + 1, max(reached, row)))
                reached = row
