"""Reading data sets, whatever format they have.

Content decides which it is, and the file's name where content leaves it open:

    begins with      PAR1       Parquet
                     [          one JSON array of rows
                     {          JSON Lines, a row each
    anything else    *.json, *.jsonl: JSON Lines, whose error then says what is wrong; else CSV
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from reftserve.server.datasets.examples import KINDS, Example, row_examples
from reftserve.server.datasets.json_rows import read_array, read_lines
from reftserve.server.datasets.source_location import SourceLocation, file_error
from reftserve.server.datasets.tables import PARQUET_MAGIC, read_csv, read_parquet

HEAD_BYTES = 4096


def read_examples(path: Path, filename: str = "") -> list[Example]:
    """All examples of a data set. filename: its owner's name for it; one that was checked before needs none.

    Raises InvalidRequest that names the line or row, the field and what is right.
    """
    return list(_examples(path, filename))


def count_examples(path: Path, filename: str = "") -> int:
    """Check a data set and count its examples.

    Raises InvalidRequest that names the line or row, the field and what is right.
    """
    count = sum(1 for _ in _examples(path, filename))
    if count == 0:
        raise file_error(f"the file is empty; expected at least one row with {KINDS}")
    return count


def dataset_hash(paths: Sequence[Path]) -> str:
    """SHA-256 over the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _examples(path: Path, filename: str) -> Iterator[Example]:
    for place, row in _rows(path, PurePath(filename).suffix.lower()):
        yield from row_examples(row, place)


def _rows(path: Path, suffix: str) -> Iterator[tuple[SourceLocation, Any]]:
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(PARQUET_MAGIC):
        return read_parquet(path)
    if suffix == ".parquet":
        raise file_error(f"not a Parquet file: it begins with {head[:4]!r} instead of {PARQUET_MAGIC!r}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise file_error("the file is UTF-16; save it as UTF-8")
    first = head.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if first == b"[":
        return read_array(path)
    if first in (b"{", b"") or suffix in (".json", ".jsonl"):
        return read_lines(path)
    return read_csv(path)
