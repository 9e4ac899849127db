"""Readers of JSON data sets: one row per line, or all rows in one array."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reftserve.server.datasets.source_location import SourceLocation, file_error

MAX_LINE_BYTES = 4 << 20
MAX_ARRAY_BYTES = 64 << 20  # the whole text of an array is in memory

_BLANKS = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


def read_lines(path: Path) -> Iterator[tuple[SourceLocation, Any]]:
    """Yield the rows of JSON Lines, without blank lines. Raises InvalidRequest with the line number."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            location = SourceLocation("line", number)
            if len(raw) > MAX_LINE_BYTES:
                raise location.error(f"{len(raw)} bytes; at most {MAX_LINE_BYTES} are read")
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as cause:
                raise location.error(f"not UTF-8 at byte {cause.start}; save the file as UTF-8") from cause
            if line:
                yield location, parse_json(line, location)


def read_array(path: Path) -> Iterator[tuple[SourceLocation, Any]]:
    """Yield the items of a JSON array one by one. Raises InvalidRequest with the row, or above MAX_ARRAY_BYTES."""
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise file_error(f"a JSON array of more than {MAX_ARRAY_BYTES} bytes; write it as JSON Lines, one row per line")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise file_error(f"not UTF-8 at byte {cause.start}; save the file as UTF-8") from cause
    position = _skip_blanks(text, text.index("[") + 1)
    number = 0
    while not text.startswith("]", position):
        location = SourceLocation("row", number := number + 1)
        if number > 1:
            if not text.startswith(",", position):
                raise location.error("not JSON (expected ',' before it, or ']' to end the array)")
            position = _skip_blanks(text, position + 1)
        with _json_errors(location):
            row, position = _DECODER.raw_decode(text, position)
        yield location, row
        position = _skip_blanks(text, position)
    if rest := text[position + 1 :].strip():
        raise file_error(f"{rest[:20]!r} follows the JSON array")


def parse_json(text: str, location: SourceLocation, prefix: str = "") -> Any:
    """Parse a JSON value. Raises InvalidRequest with the location. prefix: begins the error's message."""
    with _json_errors(location, prefix):
        return json.loads(text)


@contextmanager
def _json_errors(location: SourceLocation, prefix: str = "") -> Iterator[None]:
    try:
        yield
    except json.JSONDecodeError as cause:
        where = f"column {cause.colno}" if cause.lineno == 1 else f"line {cause.lineno}, column {cause.colno}"
        raise location.error(f"{prefix}not JSON ({cause.msg} at {where})") from cause
    except RecursionError as cause:
        raise location.error(f"{prefix}JSON that is nested too deeply") from cause
    except ValueError as cause:  # an integer with thousands of digits
        raise location.error(f"{prefix}JSON that cannot be read ({cause})") from cause


def _skip_blanks(text: str, position: int) -> int:
    found = _BLANKS.match(text, position)
    return position if found is None else found.end()
