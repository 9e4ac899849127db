"""A process's memory: returning freed memory, and exempting permanent objects from garbage collection."""

from __future__ import annotations

import ctypes
import gc


def trim_heap() -> None:
    """Return freed memory to the system; glibc keeps hundreds of MB after loading a base or after a job."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries do not have it
        trim(0)


def freeze_gc() -> None:
    """Exempt all current objects from garbage collection, at the end of start-up: a full one would take 0.2 s."""
    trim_heap()
    gc.freeze()
