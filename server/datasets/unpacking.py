"""Unpacks gzip, zstd and zip around one data file while it is read, up to a limit in bytes."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from reftserve.server.datasets.limits import max_unpacked_bytes
from reftserve.server.datasets.source_location import file_error

BUFFER_BYTES = 1 << 16
GZIP, ZSTD, ZIP = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
PACKINGS = {GZIP: "gzip", ZSTD: "zstd", ZIP: "zip"}
_SUFFIXES = (".gz", ".gzip", ".zst", ".zstd", ".zip")
_EXCEL = (
    "an Excel workbook: choose File, Save As, 'CSV UTF-8 (Comma delimited)' in Excel, or write it with "
    "`df.to_csv(path, index=False)` in pandas"
)


@dataclass(frozen=True)
class Content:
    """A data file's bytes, unpacked. packing: None for a plain file. suffix: of the name without the packing's."""

    file: io.BufferedReader[Any]
    packing: str | None
    suffix: str


@contextmanager
def open_content(path: Path, filename: str) -> Iterator[Content]:
    """Open a file and unpack it. Raises InvalidRequest for a damaged archive, one of several files, or a workbook."""
    with path.open("rb") as plain, ExitStack() as stack:
        head = plain.read(4)
        plain.seek(0)
        packing = next((name for magic, name in PACKINGS.items() if head.startswith(magic)), None)
        if packing is None:
            file = stack.enter_context(io.BufferedReader(io.FileIO(path), BUFFER_BYTES))
            yield Content(file, None, _suffix(filename))
            return
        with _packing_errors(packing):
            packed, inner = _open_packed(plain, packing, filename, stack)
        unpacked = _Unpacked(packed, packing, max_unpacked_bytes(path.stat().st_size))
        yield Content(io.BufferedReader(unpacked, BUFFER_BYTES), packing, _suffix(inner))


def _open_packed(plain: IO[bytes], packing: str, filename: str, stack: ExitStack) -> tuple[Any, str]:
    if packing == "zip":
        archive = stack.enter_context(zipfile.ZipFile(plain))
        member = _only_member(archive)
        return stack.enter_context(archive.open(member)), member.filename
    inner = filename.removesuffix(PurePath(filename).suffix) if _suffix(filename) in _SUFFIXES else filename
    if packing == "gzip":
        return stack.enter_context(gzip.GzipFile(fileobj=plain)), inner
    import pyarrow as pa

    return stack.enter_context(pa.CompressedInputStream(plain, "zstd")), inner


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    names = archive.namelist()
    if "[Content_Types].xml" in names:
        is_workbook = any(name.startswith("xl/") for name in names)
        raise file_error(_EXCEL if is_workbook else "an Office document; expected JSON Lines, JSON, CSV or Parquet")
    members = [
        member for member in archive.infolist() if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        raise file_error(f"the zip holds {len(members)} files; expected one data file: upload each alone")
    if members[0].flag_bits & 1:
        raise file_error("the zip is encrypted; upload the file that it holds")
    return members[0]


class _Unpacked(io.RawIOBase):
    """The bytes in an archive, counted. Raises InvalidRequest above the limit, and for damaged archives."""

    def __init__(self, packed: Any, packing: str, limit: int) -> None:
        self._packed = packed
        self._packing = packing
        self._limit = limit
        self._count = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        filled = 0
        # Fill the whole buffer, so that one peek shows all of a file's head.
        while filled < len(view):
            with _packing_errors(self._packing):
                chunk = self._packed.read(len(view) - filled)
            if not chunk:
                break
            view[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        self._count += filled
        if self._count > self._limit:
            raise file_error(f"the {self._packing} file unpacks to more than {self._limit} bytes; upload it unpacked")
        return filled


@contextmanager
def _packing_errors(packing: str) -> Iterator[None]:
    try:
        yield
    # zipfile and gzip name damage by these; NotImplementedError is a method of compression that Python lacks.
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, NotImplementedError, ValueError) as cause:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise
        raise file_error(f"the {packing} file is damaged or cut short; pack it again, or upload it unpacked") from cause


def _suffix(filename: str) -> str:
    return PurePath(filename).suffix.lower()
