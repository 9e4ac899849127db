"""Readers of JSON data sets: one row per line, or all rows in one array, which is parsed item by item."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

from reftserve.server.datasets.field_checks import shown
from reftserve.server.datasets.foreign_rows import advice
from reftserve.server.datasets.limits import MAX_BLANKS, MAX_ROW_CHARACTERS
from reftserve.server.datasets.source_location import SourceLocation, file_error

CHUNK_CHARACTERS = 1 << 16
CUT_CHARACTERS = 16  # an error this near to the end of what has been read may only mean that the rest is missing

_BLANKS = re.compile(r"[ \t\r\n]*")


class _DuplicateKey(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_lines(text: TextIO) -> Iterator[tuple[SourceLocation, Any]]:
    """Yield the rows of JSON Lines, without blank lines. Raises InvalidRequest with the line number."""
    number = blank = 0
    while raw := text.readline(MAX_ROW_CHARACTERS + 1):
        number += 1
        line = raw.strip()
        if line:
            location = SourceLocation("line", number)
            if len(raw) > MAX_ROW_CHARACTERS:
                raise location.error(f"more than {MAX_ROW_CHARACTERS} characters, the most that are read of a row")
            yield location, _line_value(line, text, location)
        else:
            blank += len(raw)
            if blank > MAX_BLANKS:
                raise file_error(f"the file has more than {MAX_BLANKS} blanks outside its rows; remove blank lines")


def read_array(text: TextIO) -> Iterator[tuple[SourceLocation, Any]]:
    """Yield the items of a JSON array one by one. Raises InvalidRequest with the row."""
    buffer = _Buffer(text)
    buffer.take()  # the bracket that told the format
    number = 0
    while buffer.next_character() != "]":
        location = SourceLocation("row", number := number + 1)
        if number > 1:
            if buffer.next_character() != ",":
                raise location.error("not JSON (expected ',' before it, or ']' to end the array)")
            buffer.take()
            if buffer.next_character() == "]":
                raise location.error("not JSON (a comma before ']': remove it)")
        yield location, buffer.value(location)
    buffer.take()
    if buffer.next_character():
        raise file_error("text follows the JSON array; expected one array of rows, and nothing behind it")


def parse_json(text: str, location: SourceLocation, prefix: str = "") -> Any:
    """Parse a JSON value. Raises InvalidRequest with the location. prefix: begins the error's message."""
    with _json_errors(location, prefix):
        return _DECODER.decode(text)


class _Buffer:
    """The part of a text that the current item needs."""

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self._buffer = ""
        self._position = 0

    def next_character(self) -> str:
        """Return the next character that is not blank, without taking it; "" at the end."""
        while True:
            blanks = _BLANKS.match(self._buffer, self._position)
            self._position = self._position if blanks is None else blanks.end()
            if self._position < len(self._buffer) or not self._read(CHUNK_CHARACTERS):
                return self._buffer[self._position : self._position + 1]

    def take(self) -> None:
        self.next_character()
        self._position += 1

    def value(self, location: SourceLocation) -> Any:
        self.next_character()
        size = CHUNK_CHARACTERS
        with _json_errors(location):
            while True:
                try:
                    value, end = _DECODER.raw_decode(self._buffer, self._position)
                    is_cut = end == len(self._buffer)  # a number may go on
                except json.JSONDecodeError as cause:
                    at_end = cause.pos >= len(self._buffer) - CUT_CHARACTERS
                    if not (at_end or cause.msg.startswith("Unterminated string")) or not self._read(size):
                        raise
                else:
                    if not is_cut or not self._read(size):
                        self._position = end
                        return value
                size *= 2  # so that parsing a long item anew takes twice its time, not its square
                if len(self._buffer) > MAX_ROW_CHARACTERS + CHUNK_CHARACTERS:
                    raise location.error(
                        f"more than {MAX_ROW_CHARACTERS} characters, the most that are read of a row, "
                        "or a quote that is never closed"
                    )

    def _read(self, size: int) -> bool:
        more = self._text.read(min(size, MAX_ROW_CHARACTERS))
        self._buffer = self._buffer[self._position :] + more
        self._position = 0
        return bool(more)


def _line_value(line: str, text: TextIO, location: SourceLocation) -> Any:
    with _json_errors(location):
        try:
            return _DECODER.decode(line)
        except json.JSONDecodeError as cause:
            _explain(cause, line, text, location)


def _explain(cause: json.JSONDecodeError, line: str, text: TextIO, location: SourceLocation) -> NoReturn:
    """Raise an error for a line that is not JSON; the lines behind it tell what the file is instead."""
    if line.endswith(",") and _is_json(line[:-1]):
        raise location.error("a comma at the line's end: remove it, or put all rows into one JSON array")
    if cause.msg == "Extra data":
        raise location.error(f"a second JSON value at column {cause.colno}; write one row per line") from cause
    if line.startswith("{"):
        try:
            value, _ = _DECODER.raw_decode(f"{line}\n{text.read(MAX_ROW_CHARACTERS)}")
        except json.JSONDecodeError:
            raise cause from None
        raise location.error(
            advice(value)
            or "pretty-printed JSON: a row takes several lines; write one row per line, or all rows as one JSON array"
        ) from cause
    raise cause


def _is_json(text: str) -> bool:
    try:
        _DECODER.decode(text)
    except json.JSONDecodeError:
        return False
    return True


@contextmanager
def _json_errors(location: SourceLocation, prefix: str = "") -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as cause:
        raise location.error(f"{prefix}not JSON ({cause.msg} at character {cause.pos + 1} of the row)") from cause
    except _DuplicateKey as cause:
        raise location.error(f"{prefix}the key {shown(str(cause))!r} stands twice in one object; remove one") from cause
    except RecursionError as cause:
        raise location.error(f"{prefix}JSON that is nested too deeply") from cause
    except ValueError as cause:  # an integer with thousands of digits
        raise location.error(f"{prefix}JSON that cannot be read: a number with too many digits") from cause
