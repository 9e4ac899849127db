"""A curve in text: a line of braille dots with marks on it, in axes. plotext draws it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from statistics import fmean

MARK = "●"
# The frame and the ticks take three lines. The labels and the frame take at most eleven columns.
MIN_HEIGHT, MIN_WIDTH = 4, 16
DOTS_PER_COLUMN = 2


def draw(line: Mapping[int, float], marks: Mapping[int, float], width: int, height: int) -> list[str]:
    """Return `height` lines of `width` characters; none without values or room. line, marks: finite y by x."""
    xs, ys = [*line, *marks], [*line.values(), *marks.values()]
    if not ys or height < MIN_HEIGHT or width < MIN_WIDTH:
        return []
    # The import takes 0.2 s of processor time, which only a watched job pays.
    from plotext import figure

    figure.clear()
    figure.plot_size(width, height)
    for points, marker in ((_means(line, min(xs), max(xs), width * DOTS_PER_COLUMN), "braille"), (marks, MARK)):
        if points:
            signal = figure.signal(list(points), list(points.values()), marker=marker)
            if points is not marks:
                signal.lines()
            figure.draw(signal)
    for axis, values, form in (("x", xs, "d"), ("y", ys, ".3g")):
        ends = sorted({min(values), max(values)})
        figure.ruler(axis).ticks(ends, [format(end, form) for end in ends])
    return str(figure.build().string(colorless=True)).splitlines()


def _means(line: Mapping[int, float], left: int, right: int, dots: int) -> dict[float, float]:
    """Return the mean point of each of `dots` parts of the x axis: values that share a column of dots."""
    parts: dict[int, list[int]] = defaultdict(list)
    for x in line:
        parts[round((x - left) / ((right - left) or 1) * (dots - 1))].append(x)
    return {fmean(part): fmean(line[x] for x in part) for part in parts.values()}
