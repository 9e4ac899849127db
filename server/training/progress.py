"""The metrics of a run's steps, written as events in batches, because each event costs a synced transaction.

An event has the newest step's metrics, and in `earlier` those of the steps since the event before it, so the series is
whole. The steps that no event has yet go into checkpoints, from which a resumed run writes them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reftserve.server.storage.leases import Lease
from reftserve.server.storage.tables import Job
from reftserve.server.training.job_repository import JobRepository

INTERVAL_S = 1.0
SHARE = 1e-3  # of the run's time so far: a week makes some 7,000 events, however fast its steps are
FILE = "steps.json"

Step = dict[str, Any]


class Progress:
    """The steps of one run. clock: returns seconds."""

    def __init__(
        self, repository: JobRepository, lease: Lease[Job], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._repository = repository
        self.lease = lease
        self._clock = clock
        self._began = clock()
        self._written_at = float("-inf")
        self._pending: list[Step] = []
        self._total_steps, self._eta_s = 0, 0.0

    def add(self, step: Step, *, total_steps: int, eta_s: float) -> None:
        """Add a step's metrics; write an event if one is due. eta_s: seconds until the run's end."""
        self._pending.append(step)
        self._total_steps, self._eta_s = total_steps, eta_s
        now = self._clock()
        if now - self._written_at >= max(INTERVAL_S, SHARE * (now - self._began)):
            self.flush()

    def flush(self) -> None:
        """Write the steps that no event has yet. Raises LeaseLost, or one of `OUTAGES`; they then stay pending."""
        if not self._pending:
            return
        *earlier, newest = self._pending
        data = {**newest, "total_steps": self._total_steps, "eta_s": self._eta_s}
        if earlier:
            data["earlier"] = earlier
        loss = "not finite" if newest["train_loss"] is None else f"{newest['train_loss']:.4f}"
        self._repository.progress(
            self.lease,
            f"Step {newest['step']}/{self._total_steps}: training loss {loss}",
            data,
            estimated_finish=int(time.time() + self._eta_s),
        )
        self._pending = []
        self._written_at = self._clock()

    def save(self, folder: Path) -> None:
        """Write the steps that no event has yet into a checkpoint's folder."""
        pending = {"steps": self._pending, "total_steps": self._total_steps, "eta_s": self._eta_s}
        (folder / FILE).write_text(json.dumps(pending))

    def load(self, folder: Path) -> None:
        """Take over the steps of a checkpoint that no event has."""
        file = folder / FILE
        if not file.exists():
            return  # written before events had several steps
        saved = json.loads(file.read_text())
        written = {step["step"] for step in self._repository.steps(self.lease.id)}
        self._pending = [step for step in saved["steps"] if step["step"] not in written]
        self._total_steps, self._eta_s = saved["total_steps"], saved["eta_s"]
