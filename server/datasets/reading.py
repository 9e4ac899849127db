"""Readers of data sets: the format of a file, its rows (json_rows, tables), their examples.

The first bytes decide the format, and the file name decides where they cannot:

    PAR1             Parquet
    [                JSON array of rows
    {                JSON Lines
    anything else    *.json, *.jsonl: JSON Lines, for its error message; else CSV
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
    """Return all examples. filename: the owner's, for unchecked files. Raises InvalidRequest with row and field."""
    return list(_examples(path, filename))


def count_examples(path: Path, filename: str = "") -> int:
    """Check a data set and count its examples. Raises InvalidRequest with row, field and expected value."""
    count = sum(1 for _ in _examples(path, filename))
    if count == 0:
        raise file_error(f"the file is empty; expected at least one row with {KINDS}")
    return count


def dataset_hash(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the files' bytes, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _examples(path: Path, filename: str) -> Iterator[Example]:
    for location, row in _rows(path, PurePath(filename).suffix.lower()):
        yield from row_examples(row, location)


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
