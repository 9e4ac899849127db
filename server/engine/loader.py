"""Loads interventions from their folders into host memory; above a budget it drops the least recently used.

A thread reads the files, so a running batch never waits for a disk. The engine checks their content between steps: a
thread that checked during a step would take a core from an operation that runs on all cores and waits for the slowest.
Only files so large that the check would delay a step are checked in the thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from reftserve.interventions import HashMismatch, Intervention, parse_artifact, read_artifact
from reftserve.server.engine.messages import InterventionRef

logger = logging.getLogger(__name__)
LARGE_BYTES = 4 << 20  # about 10 ms of checking


@dataclass(frozen=True)
class Loaded:
    """The outcome of one load: an intervention, or an error of the server, whose artifacts were checked before."""

    content_hash: str
    intervention: Intervention | None
    error: str | None = None


@dataclass(frozen=True)
class _Files:
    ref: InterventionRef
    manifest: bytes
    edits: bytes


class Loader:
    """Interventions in host memory, by content hash."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[str, Intervention] = OrderedDict()
        self._bytes = 0
        self._requested: set[str] = set()
        self._folders: queue.SimpleQueue[InterventionRef | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Loaded | _Files] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="intervention-loader", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> bool:
        """Whether a requested intervention is not collected yet."""
        return bool(self._requested)

    def get(self, content_hash: str) -> Intervention | None:
        """Return the intervention if it is in host memory."""
        intervention = self._kept.get(content_hash)
        if intervention is not None:
            self._kept.move_to_end(content_hash)
        return intervention

    def request(self, ref: InterventionRef) -> None:
        """Start a load that `collect` will report; do nothing if it is already under way."""
        if ref.content_hash not in self._requested:
            self._requested.add(ref.content_hash)
            self._folders.put(ref)

    def collect(self, budget_s: float) -> list[Loaded]:
        """Return finished loads without waiting. Loads beyond the budget are left for the next call."""
        done: list[Loaded] = []
        until = time.perf_counter() + budget_s
        while not self._results.empty() and (not done or time.perf_counter() < until):
            result = self._results.get()
            loaded = _check(result) if isinstance(result, _Files) else result
            self._requested.discard(loaded.content_hash)
            if loaded.intervention is not None:
                self._keep(loaded.intervention)
            done.append(loaded)
        return done

    def close(self) -> None:
        """Stop the thread after the current load."""
        self._folders.put(None)
        self._thread.join()

    def _keep(self, intervention: Intervention) -> None:
        self._kept[intervention.content_hash] = intervention
        self._bytes += intervention.columns.nbytes
        while self._bytes > self.max_bytes and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.columns.nbytes

    def _run(self) -> None:
        while (ref := self._folders.get()) is not None:
            self._results.put(_read(ref))


def _read(ref: InterventionRef) -> _Files | Loaded:
    try:
        files = _Files(ref, *read_artifact(Path(ref.folder)))
    except BaseException as cause:  # without the thread, all later loads would wait for ever
        return _failed(ref, cause)
    return _check(files) if len(files.edits) > LARGE_BYTES else files


def _check(files: _Files) -> Loaded:
    ref = files.ref
    try:
        intervention = parse_artifact(files.manifest, files.edits)
        if intervention.content_hash != ref.content_hash:
            raise HashMismatch(f"content hash is {intervention.content_hash}; expected {ref.content_hash}")
    except BaseException as cause:
        return _failed(ref, cause)
    return Loaded(ref.content_hash, intervention)


def _failed(ref: InterventionRef, cause: BaseException) -> Loaded:
    # The artifact was checked when it was published, so whatever happens here is the server's fault. Paths of its disk
    # stay in its log.
    logger.error("cannot load the intervention in %s", ref.folder, exc_info=cause)
    reason = (cause.strerror if isinstance(cause, OSError) else str(cause)) or type(cause).__name__
    return Loaded(ref.content_hash, None, f"cannot load intervention from {Path(ref.folder).name}: {reason}")
