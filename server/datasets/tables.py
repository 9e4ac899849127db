"""Reads rows of CSV and Parquet files in batches through Arrow, which is imported with the first of these files.

Parquet stores repeated values once, so two sizes are bounded: the declared one, and the one found while unfolding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftserve.server.datasets.examples import FIELDS, KINDS, row_kind
from reftserve.server.datasets.source_location import SourceLocation, file_error

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_MAGIC = b"PAR1"
MAX_CELL_BYTES = 4 << 20
MAX_UNFOLDED_BYTES = 1 << 30
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20


def read_csv(path: Path) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    """Yield the rows of comma-separated UTF-8 with a header. Raises InvalidRequest for an unreadable file."""
    import pyarrow as pa
    from pyarrow import csv

    with (
        _arrow_errors("CSV"),
        csv.open_csv(
            path,
            # A row can be at most as long as a block.
            read_options=csv.ReadOptions(block_size=MAX_CELL_BYTES, use_threads=False),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types=dict.fromkeys(FIELDS, pa.string())),
        ) as reader,
    ):
        _check_columns(reader.schema.names)
        # The header is row 1, as in spreadsheets and in Arrow's errors.
        yield from _numbered(reader, first=2)


def read_parquet(path: Path) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    """Yield the rows of a Parquet file. Raises InvalidRequest if it is unreadable or exceeds a limit."""
    from pyarrow import parquet

    with _arrow_errors("Parquet"):
        metadata = parquet.read_metadata(path)
        unfolded = sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))
        if unfolded > MAX_UNFOLDED_BYTES:
            raise file_error(f"the Parquet file unfolds to {unfolded} bytes; at most {MAX_UNFOLDED_BYTES} are read")
        columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
        with parquet.ParquetFile(
            path,
            metadata=metadata,
            # Keep repeated texts folded until `_text_bytes` has checked their size.
            read_dictionary=[column.path for column in columns if column.physical_type == "BYTE_ARRAY"],
            buffer_size=BUFFER_BYTES,
            page_checksum_verification=True,
        ) as file:
            _check_columns(file.schema_arrow.names)
            yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS, use_threads=False), first=1)


def _numbered(batches: Iterator[pa.RecordBatch], *, first: int) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    number = first
    unfolded = 0
    for batch in batches:
        batch.validate(full=True)
        unfolded += _text_bytes(batch)
        if unfolded > MAX_UNFOLDED_BYTES:
            raise file_error(f"the file unfolds to more than {MAX_UNFOLDED_BYTES} bytes of text; split it")
        for row in batch.to_pylist():
            yield SourceLocation("row", number), row
            number += 1


def _text_bytes(batch: pa.RecordBatch) -> int:
    """Return the bytes of all texts, a repeated one once for each cell. Raises InvalidRequest for one too long."""
    import pyarrow.compute as pc

    total = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for leaf in _leaves(column):
            lengths = _lengths(leaf)
            longest = pc.max(lengths).as_py() or 0
            if longest > MAX_CELL_BYTES:
                raise file_error(f"column {name!r} has a text of {longest} bytes; at most {MAX_CELL_BYTES} are read")
            total += pc.sum(lengths).as_py() or 0
    return total


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _leaves(field)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        yield from _leaves(array.flatten())
    else:
        yield array


def _lengths(leaf: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(leaf.type):
        return pc.take(_lengths(leaf.dictionary), leaf.indices)
    if leaf.type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return pc.binary_length(leaf)
    return pa.nulls(len(leaf), pa.int64())


def _check_columns(names: Sequence[str]) -> None:
    kind = row_kind(names)
    found = ", ".join(map(repr, names[:20]))
    if kind is None:
        raise file_error(f"the columns are {found}; expected {KINDS}, separated by commas in CSV")
    missing = [name for name, field in kind.model_fields.items() if field.is_required() and name not in names]
    unknown = [name for name in names if name not in kind.model_fields]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    for wrong, what in ((missing, "is missing"), (unknown, "is unknown: remove it"), (repeated, "occurs twice")):
        if wrong:
            raise file_error(f"column {wrong[0]!r} {what}; the columns are {found}, expected {KINDS}")


@contextmanager
def _arrow_errors(kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as cause:
        # Arrow also reports corrupt data as an OSError, but without the errno of a system call.
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        if "straddling" in str(cause):  # Arrow's message about a row longer than a block
            raise file_error(f"a row has more than {MAX_CELL_BYTES} bytes, or a quote is never closed") from cause
        raise file_error(f"the file cannot be read as {kind}: {cause}") from cause
