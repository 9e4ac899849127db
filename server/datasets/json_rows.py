"""Rows as JSON: one a line, or all in one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reftserve.server.datasets.source_location import SourceLocation, file_error

MAX_LINE_BYTES = 4 << 20
# The text of an array is in memory as a whole.
MAX_ARRAY_BYTES = 64 << 20

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_lines(path: Path) -> Iterator[tuple[SourceLocation, Any]]:
    """The rows of JSON Lines; blank lines are none.

    Raises InvalidRequest that names the line.
    """
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            place = SourceLocation("line", number)
            if len(raw) > MAX_LINE_BYTES:
                raise place.error(f"{len(raw)} bytes; at most {MAX_LINE_BYTES} are read")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as cause:
                raise place.error(f"not UTF-8 at byte {cause.start}; save the file as UTF-8") from cause
            if line:
                yield place, parse_json(line, place)


def read_array(path: Path) -> Iterator[tuple[SourceLocation, Any]]:
    """The items of a JSON array, decoded one by one, so that an error knows its row.

    Raises InvalidRequest that names the row, or when the file has more than MAX_ARRAY_BYTES.
    """
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise file_error(f"a JSON array of more than {MAX_ARRAY_BYTES} bytes; write it as JSON Lines, one row a line")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise file_error(f"not UTF-8 at byte {cause.start}; save the file as UTF-8") from cause
    position = _behind_blanks(text, text.index("[") + 1)
    number = 0
    while not text.startswith("]", position):
        place = SourceLocation("row", number := number + 1)
        if number > 1:
            if not text.startswith(",", position):
                raise place.error("not JSON (no ',' before it, and no ']' that ends the array)")
            position = _behind_blanks(text, position + 1)
        with _json_errors(place):
            row, position = _DECODER.raw_decode(text, position)
        yield place, row
        position = _behind_blanks(text, position)
    if rest := text[position + 1 :].strip():
        raise file_error(f"{rest[:20]!r} stands behind the JSON array")


def parse_json(text: str, place: SourceLocation, what: str = "") -> Any:
    """A JSON value. what: begins the error's message.

    Raises InvalidRequest that names the place.
    """
    with _json_errors(place, what):
        return json.loads(text)


@contextmanager
def _json_errors(place: SourceLocation, what: str = "") -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as cause:
        where = f"column {cause.colno}" if cause.lineno == 1 else f"line {cause.lineno}, column {cause.colno}"
        raise place.error(f"{what}not JSON ({cause.msg} at {where})") from cause
    except RecursionError as cause:
        raise place.error(f"{what}JSON that is nested too deeply") from cause
    except ValueError as cause:  # a number of thousands of digits
        raise place.error(f"{what}JSON that cannot be read ({cause})") from cause


def _behind_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    return position if found is None else found.end()
