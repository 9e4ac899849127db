"""The temporary folder where the HTTP process and one engine process meet: a socket, and the ids of running requests.

The engine writes the ids before a step that has new ones. When the process has been killed, the server reads which
requests its last step computed: one of them may be the cause.
"""

from __future__ import annotations

import mmap
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path

from reftserve.server.engine.engine_errors import EngineDied

LONGEST_PATH = 107  # bytes of a Unix socket's path (sun_path, unix(7))
SOCKET, RUNNING = "engine", "running"
RECORD_BYTES = 256 << 10
LENGTH = struct.Struct("<q")


def make_engine_folder() -> tempfile.TemporaryDirectory[str]:
    """Create the folder in the first temporary folder that exists, can be written and has a short path.

    Raises EngineDied with the reasons when there is none.
    """
    reasons = []
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):  # noqa: S108 - the folder itself is private
        try:
            folder = tempfile.TemporaryDirectory(prefix="reftserve-", dir=parent)
        except OSError as cause:
            reasons.append(f"{parent}: {cause.strerror}")
            continue
        if len(str(Path(folder.name) / SOCKET).encode()) <= LONGEST_PATH:
            return folder
        reasons.append(f"{parent}: a socket's path may have {LONGEST_PATH} bytes")
        folder.cleanup()
    raise EngineDied(
        f"no folder for the engine's socket; set TMPDIR to a short path that exists ({'; '.join(reasons)})"
    )


def socket_address(folder: Path) -> str:
    """Return the address at which the HTTP process binds and the engine connects."""
    return f"ipc://{folder / SOCKET}"


class RunningRecord:
    """The ids of the running requests, in a file that outlives the engine."""

    def __init__(self, folder: Path) -> None:
        with (folder / RUNNING).open("w+b") as file:
            # Written, not truncated: a page that a full disk cannot hold would kill the process later.
            file.write(bytes(RECORD_BYTES))
            file.flush()
            self._memory = mmap.mmap(file.fileno(), RECORD_BYTES)

    def write(self, request_ids: Iterable[str]) -> None:
        """Replace the ids. Mapped memory waits for no disk, and the kernel keeps it when the process dies."""
        content = "\n".join(request_ids).encode()[: RECORD_BYTES - LENGTH.size]
        self._memory[LENGTH.size : LENGTH.size + len(content)] = content
        LENGTH.pack_into(self._memory, 0, len(content))


def read_running(folder: Path) -> set[str]:
    """Return the ids that the engine wrote last; none if it never ran a step."""
    file = folder / RUNNING
    content = file.read_bytes() if file.exists() else b""
    if not content:
        return set()
    [length] = LENGTH.unpack_from(content)
    return set(content[LENGTH.size : LENGTH.size + length].decode().split("\n")) - {""}
