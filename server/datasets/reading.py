"""Readers of data sets: the format of a file, its rows (json_rows, csv_rows, parquet_rows), their examples.

A file in gzip, zstd or zip is unpacked while it is read. Then the first bytes decide the format, and the file name
decides where they cannot:

    PAR1             Parquet
    [                JSON array of rows
    {                JSON Lines
    anything else    *.json, *.jsonl: JSON Lines, for its error message; else CSV
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from reftserve.server.datasets.csv_rows import read_csv
from reftserve.server.datasets.examples import Example
from reftserve.server.datasets.json_rows import read_array, read_lines
from reftserve.server.datasets.limits import MAX_EXAMPLES
from reftserve.server.datasets.parquet_rows import PARQUET_MAGIC, read_parquet
from reftserve.server.datasets.rows import KINDS, row_examples
from reftserve.server.datasets.source_location import SourceLocation, file_error
from reftserve.server.datasets.text_encoding import decoding_error, text_encoding
from reftserve.server.datasets.unpacking import PACKINGS, Content, open_content

HEAD_BYTES = 4096
CHUNK_BYTES = 1 << 20
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")


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
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _examples(path: Path, filename: str) -> Iterator[Example]:
    count = 0
    for location, row in _rows(path, filename):
        found = row_examples(row, location)
        count += len(found)
        if count > MAX_EXAMPLES:
            raise location.error(f"more than {MAX_EXAMPLES} examples, the most that a file may have; split it")
        yield from found


def _rows(path: Path, filename: str) -> Iterator[tuple[SourceLocation, Any]]:
    with open_content(path, filename) as content:
        head = content.file.peek(HEAD_BYTES)[:HEAD_BYTES]
        if head.startswith(PARQUET_MAGIC):
            if content.packing is not None:
                raise file_error(f"a Parquet file in {content.packing}: Parquet is packed in itself, upload it alone")
            yield from read_parquet(path)
            return
        if content.suffix == ".parquet":
            raise file_error("not a Parquet file, in spite of its name: it does not begin with 'PAR1'")
        if any(head.startswith(magic) for magic in PACKINGS):
            raise file_error(f"a packed file in {content.packing}; pack it once")
        encoding = text_encoding(head)
        try:
            yield from _text_rows(content, head, encoding)
        except UnicodeDecodeError as cause:
            with open_content(path, filename) as again:
                raise decoding_error(again.file, encoding) from cause


def _text_rows(content: Content, head: bytes, encoding: str) -> Iterator[tuple[SourceLocation, Any]]:
    first = head.decode(encoding, "ignore").lstrip()[:1]
    is_json = first in ("{", "[", "") or content.suffix in JSON_SUFFIXES
    # JSON has no line ends inside texts, so all kinds of them end a line; a cell of CSV keeps its own.
    text = io.TextIOWrapper(content.file, encoding, newline=None if is_json else "")
    if first == "[":
        return read_array(text)
    return read_lines(text) if is_json else read_csv(text)
