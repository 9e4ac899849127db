"""The check of an uploaded file, in a process with limits on memory and time.

A hostile file can then neither hold the interpreter's lock of the HTTP process nor take its memory, and a fault in a
C++ reader ends the check only.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from reftserve.server.datasets.source_location import file_error
from reftserve.server.errors import InvalidRequest, Overloaded

MEMORY_BYTES = 256 << 20  # that a check may write to; Python and Arrow take 40 to 60 MiB of it
CPU_S = 30  # a million short rows take 10
CPU_BYTES_PER_S = 2 << 20  # honest files are read at 10 to 100 MB/s
WALL_PER_CPU = 6  # the processor is shared with engine and worker
MAX_CHECKS = 2
WAIT_S = 60.0

# Arrow's own pool reserves a gigabyte at once, which would count as memory; OpenBLAS (NumPy's), 32 MB a thread.
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_SLOTS = threading.BoundedSemaphore(MAX_CHECKS)


def check_data_set(path: Path, filename: str) -> int:
    """Return the number of examples in a file. Raises InvalidRequest with row, field and reason, or Overloaded."""
    if not _SLOTS.acquire(timeout=WAIT_S):
        raise Overloaded(f"{MAX_CHECKS} uploads have been checked for {WAIT_S:g} s; try again", retry_after_s=WAIT_S)
    try:
        return _checked(path, filename)
    finally:
        _SLOTS.release()


def _checked(path: Path, filename: str) -> int:
    cpu_s = CPU_S + path.stat().st_size // CPU_BYTES_PER_S
    task = {"path": str(path), "filename": filename, "memory_bytes": MEMORY_BYTES, "cpu_s": cpu_s}
    try:
        ended = subprocess.run(
            # -P: no module in the working folder takes the place of Python's.
            [sys.executable, "-P", "-m", "reftserve.server.datasets.check_process"],
            input=json.dumps(task).encode(),
            capture_output=True,
            timeout=WALL_PER_CPU * cpu_s,
            env={**os.environ, **_ENVIRONMENT},
            check=False,
        )
    except subprocess.TimeoutExpired as cause:
        raise _too_slow(WALL_PER_CPU * cpu_s) from cause
    if ended.returncode == -signal.SIGXCPU:
        raise _too_slow(cpu_s)
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        raise file_error(f"the file cannot be read: {name} ended the process that read it; it is damaged or too large")
    if ended.returncode:
        raise RuntimeError(f"the check of an upload failed:\n{ended.stderr.decode(errors='replace')}")
    answer = json.loads(ended.stdout)
    if "examples" not in answer:
        raise InvalidRequest(answer["message"], param=answer["param"], code=answer["code"])
    return int(answer["examples"])


def _too_slow(seconds: int) -> InvalidRequest:
    return file_error(f"reading the file took more than {seconds} s of time; split it, or write it as JSON Lines")
