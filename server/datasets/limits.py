"""Bounds on what is read of a data file: far above honest data, far below what costs seconds or gigabytes."""

from __future__ import annotations

MAX_ROW_CHARACTERS = 4 << 20  # a line of JSON Lines, an item of a JSON array, a row of CSV
MAX_CELL_BYTES = 4 << 20  # a text in Parquet
MAX_COLUMNS = 64
MAX_BLANKS = 1 << 20  # characters in blank lines; a compressed file can hold a billion of them
MAX_TURNS = 2000  # of a conversation
MAX_PROMPTS_CHARACTERS = 32 << 20  # of all prompts of a conversation: each answer's prompt repeats the turns before it
MAX_PARTS = 1000  # text parts of one message
MAX_EXAMPLES = 1_000_000  # of a file; training holds all of them in memory
MAX_UNPACKED_BYTES = 1 << 30
ALWAYS_UNPACKED_BYTES = 64 << 20
MAX_UNPACKED_RATIO = 100


def max_unpacked_bytes(packed_bytes: int) -> int:
    """Return how many bytes a compressed file may unpack to: little for small files, which are bombs otherwise."""
    return min(MAX_UNPACKED_BYTES, max(ALWAYS_UNPACKED_BYTES, MAX_UNPACKED_RATIO * packed_bytes))
