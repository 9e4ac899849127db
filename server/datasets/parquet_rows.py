"""Reader of Parquet through Arrow, which is imported with the first such file.

Parquet stores equal values and nulls once, so a file of a kilobyte can hold millions of list items or gigabytes of
text. Columns are judged by schema and footer before a row is read, each batch before it becomes Python objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reftserve.server.datasets.columns import check_columns, unknown_columns
from reftserve.server.datasets.limits import MAX_CELL_BYTES, MAX_COLUMNS, MAX_EXAMPLES, MAX_TURNS, max_unpacked_bytes
from reftserve.server.datasets.parquet_types import check_type
from reftserve.server.datasets.rows import FIELDS
from reftserve.server.datasets.source_location import SourceLocation, file_error

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import parquet

PARQUET_MAGIC = b"PAR1"
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20
SLICE_BYTES = 8 << 20  # unfolded, that become Python objects at once
BYTES_PER_CELL = 32  # that each value counts beside its text: a null costs no byte in the file, but an object here


def read_parquet(path: Path) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    """Yield the rows of a Parquet file. Raises InvalidRequest if it is unreadable or exceeds a limit."""
    from pyarrow import parquet

    limit = max_unpacked_bytes(path.stat().st_size)
    with _arrow_errors():
        metadata = parquet.read_metadata(path)
        _check_footer(metadata, limit)
        columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
        with parquet.ParquetFile(
            path,
            metadata=metadata,
            # Keep repeated texts folded until `_unfolded_bytes` has checked their size.
            read_dictionary=[column.path for column in columns if column.physical_type == "BYTE_ARRAY"],
            buffer_size=BUFFER_BYTES,
            page_checksum_verification=True,
        ) as file:
            check_columns(file.schema_arrow.names)
            for field in file.schema_arrow:
                if field.name in FIELDS:
                    check_type(field.name, field.type)
            yield from _numbered(file.iter_batches(batch_size=BATCH_ROWS, use_threads=False), limit)


def _check_footer(metadata: parquet.FileMetaData, limit: int) -> None:
    if metadata.num_columns > MAX_COLUMNS:
        raise file_error(f"the table has {metadata.num_columns} columns; at most {MAX_COLUMNS} are read")
    if metadata.num_rows > MAX_EXAMPLES:
        raise file_error(f"the table has {metadata.num_rows} rows; at most {MAX_EXAMPLES} are read; split it")
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    unfolded = sum(group.total_byte_size for group in groups)
    if unfolded > limit:
        raise file_error(f"the Parquet file unfolds to {unfolded} bytes; at most {limit} are read")


def _numbered(batches: Iterator[pa.RecordBatch], limit: int) -> Iterator[tuple[SourceLocation, dict[str, Any]]]:
    number = 1
    unfolded = 0
    for batch in batches:
        batch.validate(full=True)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if name not in FIELDS and not _is_empty(column):
                raise file_error(unknown_columns(batch.schema.names))
        known = batch.select([name for name in batch.schema.names if name in FIELDS])
        _check_lists(known, number)
        size = _unfolded_bytes(known)
        unfolded += size
        if unfolded > limit:
            raise file_error(f"the file unfolds to more than {limit} bytes; split it")
        rows = max(1, min(len(known), len(known) * SLICE_BYTES // max(size, 1)))
        for start in range(0, len(known), rows):
            for row in known.slice(start, rows).to_pylist():
                yield SourceLocation("row", number), row
                number += 1


def _check_lists(batch: pa.RecordBatch, first: int) -> None:
    """Check the lengths of all lists. Raises InvalidRequest with the row. first: number of the batch's first row."""
    import pyarrow.compute as pc

    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _is_list(column):
            lengths = pc.fill_null(pc.list_value_length(column), 0)
            longest = pc.max(lengths).as_py() or 0
            if longest > MAX_TURNS:
                row = first + pc.index(lengths, longest).as_py()
                raise SourceLocation("row", row).error(
                    f"field {name}: {longest} messages; a conversation has at most {MAX_TURNS}"
                )


def _is_empty(array: pa.Array) -> bool:
    """Return whether a column has neither values nor list items: other rows of its export had some."""
    if array.null_count == len(array):
        return True
    return _is_list(array) and len(array.flatten()) == 0


def _unfolded_bytes(batch: pa.RecordBatch) -> int:
    """Return the bytes of all cells, a repeated text once for each cell. Raises InvalidRequest for a text too long."""
    import pyarrow.compute as pc

    total = 0
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        for leaf in _leaves(column):
            lengths = _lengths(leaf)
            longest = pc.max(lengths).as_py() or 0
            if longest > MAX_CELL_BYTES:
                raise file_error(f"column {name!r} has a text of {longest} bytes; at most {MAX_CELL_BYTES} are read")
            total += BYTES_PER_CELL * len(leaf) + (pc.sum(lengths).as_py() or 0)
    return total


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        for field in array.flatten():
            yield from _leaves(field)
    elif _is_list(array):
        yield from _leaves(array.flatten())
    else:
        yield array


def _is_list(array: pa.Array) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_list(array.type) or pa.types.is_large_list(array.type))


def _lengths(leaf: pa.Array) -> pa.Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(leaf.type):
        return pc.take(_lengths(leaf.dictionary), leaf.indices)
    if leaf.type in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary()):
        return pc.binary_length(leaf)
    return pa.nulls(len(leaf), pa.int64())


@contextmanager
def _arrow_errors() -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except pa.ArrowMemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as cause:
        # Arrow also reports corrupt data as an OSError, but without the errno of a system call.
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        raise file_error(
            "the file cannot be read as Parquet: it is damaged or cut short; write or upload it again"
        ) from cause
