"""Reader of CSV, in what Excel and other programs make of it: commas, semicolons or tabs, and any ends of line."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from reftserve.server.datasets.columns import check_columns, unknown_columns
from reftserve.server.datasets.limits import MAX_ROW_CHARACTERS
from reftserve.server.datasets.rows import FIELDS
from reftserve.server.datasets.source_location import SourceLocation, file_error

DELIMITERS = ",;\t|"

# The module's default of 131,072 would refuse long texts.
csv.field_size_limit(MAX_ROW_CHARACTERS + 1)


def read_csv(text: TextIO) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    """Yield the rows of a table with a header. Raises InvalidRequest for an unreadable file.

    text: opened with `newline=""`, so that line ends inside quotes stay. The header is row 1, as in spreadsheets.
    """
    lines = _Lines(text)
    header = next(lines, "")
    number = 1
    delimiter = None
    if header.lower().startswith("sep=") and len(header.rstrip("\r\n")) == len("sep=") + 1:
        delimiter = header[len("sep=")]
        header = next(lines, "")
        number = 2
    if header.isspace() or not header:
        header = _first_filled(lines)
    delimiter = delimiter or _delimiter(header)
    records = _records(lines, header, delimiter, number)
    names = next(records, (number, []))[1]
    if not names:
        return
    check_columns(names)
    unknown = [index for index, name in enumerate(names) if name not in FIELDS]
    for row_number, cells in records:
        location = SourceLocation("row", row_number)
        _check_width(cells, names, location)
        if any(cells[index] for index in unknown):
            raise file_error(unknown_columns(names))
        yield location, {name: cell for name, cell in zip(names, cells, strict=True) if name in FIELDS}


class _Lines:
    """The lines of a text. characters: read since the reader's owner set it to 0, to bound a row of many lines."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.characters = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_ROW_CHARACTERS + 1)
        if not line:
            raise StopIteration
        self.characters += len(line)
        if self.characters > MAX_ROW_CHARACTERS:
            raise file_error(
                f"a row has more than {MAX_ROW_CHARACTERS} characters, blank lines before it counted: it is too long, "
                "or a quote is never closed"
            )
        return line


def _first_filled(lines: _Lines) -> str:
    for line in lines:
        if not line.isspace():
            return line
    return ""


def _delimiter(header: str) -> str:
    """Return the delimiter with which the header names the most known columns; a comma when none is better."""
    known = Counter({found: _known(header, found) for found in DELIMITERS})
    return max(DELIMITERS, key=lambda found: known[found])


def _known(header: str, delimiter: str) -> int:
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
        return 0
    return len(FIELDS.intersection(names))


def _records(lines: _Lines, header: str, delimiter: str, number: int) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each row that is not blank."""

    def all_lines() -> Iterator[str]:
        yield header
        yield from lines

    reader = csv.reader(all_lines(), delimiter=delimiter, strict=True)
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as cause:
            raise SourceLocation("row", number).error(_csv_error(cause)) from cause
        if cells is None:
            return
        if cells:
            lines.characters = 0
            yield number, cells
            number += 1


def _csv_error(cause: csv.Error) -> str:
    if "unexpected end" in str(cause):
        return "a quote is never closed"
    if "expected after" in str(cause):
        return "text follows a closing quote; a quote inside a quoted cell is written twice"
    return f"cannot be read as CSV: {cause}"


def _check_width(cells: Sequence[str], names: Sequence[str], location: SourceLocation) -> None:
    if len(cells) == len(names):
        return
    cure = "a cell that contains the delimiter or a line's end stands in quotes"
    if len(cells) == len(names) + 1 and not cells[-1]:
        cure = "remove the delimiter at the row's end"
    raise location.error(f"{len(cells)} cells, but the header has {len(names)} columns; {cure}")
