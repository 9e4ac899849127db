"""The memory of a process: what it no longer uses, and what it keeps for good."""

from __future__ import annotations

import ctypes
import gc


def trim_heap() -> None:
    """Return to the system what the process no longer uses, after it held much for a while.

    glibc keeps the room of freed tensors up to 32 MB for itself: of a loaded base, or of a job, hundreds of megabytes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have no such call
        trim(0)


def freeze_gc() -> None:
    """To be called once, when a process has made what it keeps: Python's collector leaves that alone from now on.

    A full round over the objects of torch and transformers would take 0.2 s again and again, between two tokens.
    """
    trim_heap()
    gc.freeze()
