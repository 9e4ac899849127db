"""A process's memory: returning freed memory, and exempting permanent objects from garbage collection."""

from __future__ import annotations

import ctypes
import gc


def trim_heap() -> None:
    """Return freed memory to the system.

    glibc keeps the memory of freed tensors of up to 32 MB: hundreds of megabytes after loading a base or after a job.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries do not have it
        trim(0)


def freeze_gc() -> None:
    """Exempt all current objects from garbage collection. Call it once, at the end of a process's start-up.

    A full collection over the objects of torch and transformers would repeatedly take 0.2 s between two tokens.
    """
    trim_heap()
    gc.freeze()
