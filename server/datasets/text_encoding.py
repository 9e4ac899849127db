"""The encoding of a text file, by its first bytes; and messages about files that are no text, or not UTF-8."""

from __future__ import annotations

import codecs
from typing import IO

from reftserve.server.datasets.source_location import file_error
from reftserve.server.errors import InvalidRequest

CHUNK_BYTES = 1 << 20
FORMATS = "expected JSON Lines, a JSON array, CSV or Parquet"

# UTF-32's mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SIGNATURES = (
    (b"\xd0\xcf\x11\xe0", "an Excel workbook of the old kind (.xls): save it as 'CSV UTF-8' in Excel and upload that"),
    (b"%PDF", f"a PDF; {FORMATS}"),
    (b"BZh", "a bzip2 file; unpack it first (gzip, zstd and zip are unpacked here)"),
    (b"\xfd7zXZ", "an xz file; unpack it first (gzip, zstd and zip are unpacked here)"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first (gzip, zstd and zip are unpacked here)"),
    (b"Rar!", "a RAR archive; unpack it first (gzip, zstd and zip are unpacked here)"),
    (b"SQLite format 3", f"an SQLite database; {FORMATS}"),
    (b"ARROW1", "an Arrow file; write it with `to_parquet`"),
    (b"\xff\xff\xff\xff", "an Arrow stream; write it with `to_parquet`"),
    (b"ORC", f"an ORC file; {FORMATS}"),
    (b"Obj\x01", f"an Avro file; {FORMATS}"),
    (b"\x89PNG", f"an image; {FORMATS}"),
    (b"\x80", f"a pickle or another binary file; {FORMATS}"),
    (b"<!DOCTYPE", f"a web page, perhaps in place of a download; {FORMATS}"),
    (b"<html", f"a web page, perhaps in place of a download; {FORMATS}"),
    (b"<?xml", f"an XML file; {FORMATS}"),
)


def text_encoding(head: bytes) -> str:
    """Return the codec of a text that begins with these bytes. Raises InvalidRequest for a file that is no text."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    for signature, kind in _SIGNATURES:
        if head.startswith(signature):
            raise file_error(f"the file is {kind}")
    # Later lines may have the character NUL in a cell.
    line = head.partition(b"\n")[0]
    if b"\0" in line:
        zeros = [line[start::2].count(0) for start in (0, 1)]
        if min(zeros) == 0 and max(zeros) > len(line) // 8:
            raise file_error("the file is UTF-16 without a byte order mark; save it as UTF-8")
        raise file_error(f"the file is no text: it holds zero bytes; {FORMATS}")
    return "utf-8"


def decoding_error(file: IO[bytes], encoding: str) -> InvalidRequest:
    """Return the error about the first bytes that the encoding does not know. file: at its beginning."""
    decoder = codecs.getincrementaldecoder(encoding)()
    offset, lines = 0, 1
    chunk = b"-"
    while chunk:
        chunk = file.read(CHUNK_BYTES)
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as cause:
            # The decoder prepends bytes that an earlier chunk left incomplete.
            begin = offset + len(chunk) - len(cause.object)
            lines += cause.object[: cause.start].count(b"\n")
            return _error(encoding, begin + cause.start, lines)
        offset += len(chunk)
        lines += chunk.count(b"\n")
    return file_error("the file changed while it was read")


def _error(encoding: str, byte: int, line: int) -> InvalidRequest:
    if not encoding.startswith("utf-8"):
        return file_error(f"the file is damaged: not {encoding.upper()} at byte {byte}; save it as UTF-8")
    return file_error(
        f"the file is not UTF-8 at byte {byte}, line {line}. Excel's plain 'CSV' and older Windows programs write "
        "Windows-1252: save it as 'CSV UTF-8', or convert it with `iconv -f WINDOWS-1252 -t UTF-8`"
    )
