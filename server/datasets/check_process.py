"""The process that checks one uploaded file: `python -P -m reftserve.server.datasets.check_process`.

It takes one line of JSON on standard input, {"path", "filename", "memory_bytes", "cpu_s"}, limits itself, and answers
with one object on standard output: {"examples": n}, or {"message", "param", "code"} of an InvalidRequest.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

from reftserve.server.errors import InvalidRequest

NICENESS = 10  # the engine's and the HTTP process' work comes first


def main() -> None:
    """Check the file and print the answer."""
    task = json.loads(sys.stdin.readline())
    # RLIMIT_DATA counts what the process can write to. RLIMIT_AS would count the libraries that Arrow maps, too.
    resource.setrlimit(resource.RLIMIT_DATA, (task["memory_bytes"], task["memory_bytes"]))
    # The soft limit sends SIGXCPU, which tells the parent the reason; the hard one would send SIGKILL.
    resource.setrlimit(resource.RLIMIT_CPU, (task["cpu_s"], task["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    print(json.dumps(_answer(Path(task["path"]), task["filename"], task["memory_bytes"])))


def _answer(path: Path, filename: str, memory_bytes: int) -> dict[str, Any]:
    from reftserve.server.datasets.reading import count_examples

    try:
        return {"examples": count_examples(path, filename)}
    except InvalidRequest as cause:
        return {"message": cause.message, "param": cause.param, "code": cause.code}
    except MemoryError:  # also Arrow's
        return {
            "message": f"reading the file takes more than {memory_bytes >> 20} MiB of memory; write it as JSON Lines",
            "param": "file",
            "code": "invalid_data",
        }


if __name__ == "__main__":
    main()
