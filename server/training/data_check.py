"""The check of a job's data for /v1/fine_tuning/validate, in a process with limits on memory and time.

Reading, rendering and encoding a large file takes minutes of Python, which would stall the streams of the HTTP process.
The worker prepares jobs without these limits, because it serves nobody.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
from pydantic import BaseModel

from reftserve.client.schemas import DataReport, Method
from reftserve.server.base.folder import Base
from reftserve.server.errors import InvalidRequest, Overloaded, ServerError
from reftserve.server.settings import Settings
from reftserve.server.training.preparation import prepare

MEMORY_BYTES = 2 << 30
TIME_S = 300
MAX_CHECKS = 2
WAIT_S = 60.0
# Some tens of milliseconds in a thread, a second in a process of its own, which has to load the tokenizer.
SMALL_BYTES = 16 << 10


class CheckTask(BaseModel):
    """A check of data sets, by name, as its process gets it on standard input."""

    settings: Settings
    method: Method | None
    files: dict[str, Path]
    seed: int
    memory_bytes: int
    time_s: int


class CheckAnswer(msgspec.Struct):
    """The process's answer: the report as JSON, or the error of the data."""

    report: str | None = None
    message: str = ""
    param: str | None = None
    code: str | None = None


class DataCheck:
    """Checks data sets; at most MAX_CHECKS at once."""

    def __init__(self, settings: Settings, base: Base) -> None:
        self._settings = settings
        self._base = base
        self._slots = threading.BoundedSemaphore(MAX_CHECKS)

    def report(self, method: Method | None, files: dict[str, Path], *, seed: int) -> DataReport:
        """Return the report on a job's data sets, by name. Raises InvalidRequest as `prepare` does, or Overloaded."""
        if sum(file.stat().st_size for file in files.values()) <= SMALL_BYTES:
            return prepare(self._base, method, files, seed=seed).report
        if not self._slots.acquire(timeout=WAIT_S):
            raise Overloaded(f"{MAX_CHECKS} data sets have been checked for {WAIT_S:g} s", retry_after_s=WAIT_S)
        try:
            task = CheckTask(
                settings=self._settings,
                method=method,
                files=files,
                seed=seed,
                memory_bytes=MEMORY_BYTES,
                time_s=TIME_S,
            )
            return _report(task)
        finally:
            self._slots.release()


def _report(task: CheckTask) -> DataReport:
    # -P: no module in the working folder takes the place of Python's.
    command = [sys.executable, "-P", "-m", "reftserve.server.training.data_check_process"]
    try:
        ended = subprocess.run(  # noqa: S603 - a fixed command
            command, input=task.model_dump_json().encode(), capture_output=True, timeout=task.time_s, check=False
        )
    except subprocess.TimeoutExpired as cause:
        raise _too_much(f"more than {task.time_s} s") from cause
    if ended.returncode < 0:
        raise _too_much(f"more than the machine has: {signal.Signals(-ended.returncode).name} ended the check")
    if ended.returncode:
        raise ServerError(f"the check of the data failed:\n{ended.stderr.decode(errors='replace')[-2000:]}")
    answer = msgspec.json.decode(ended.stdout, type=CheckAnswer)
    if answer.report is None:
        raise InvalidRequest(answer.message, param=answer.param, code=answer.code)
    return DataReport.model_validate_json(answer.report)


def _too_much(what: str) -> InvalidRequest:
    return InvalidRequest(
        f"checking the data takes {what}; create the job, which checks its data in the background, or use a part",
        param="training_file",
        code="data_too_large",
    )
