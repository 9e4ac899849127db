"""The memory of a process."""

from __future__ import annotations

import ctypes
import gc


def give_back_memory() -> None:
    """Return to the system what the process no longer uses, after it held much for a while.

    glibc keeps the room of freed tensors up to 32 MB for itself: of a loaded base, or of a job, hundreds of megabytes.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have no such call
        trim(0)
