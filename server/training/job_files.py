"""What a job keeps in the blob store while it may still go on: a copy of its data, and its checkpoints.

    blobs / jobs / <id> / training.jsonl  validation.jsonl  checkpoint-<step>-<any>/

Any worker can read them, so any can take a job over. A checkpoint counts once its row is committed, and has a key of
its own: what a run that was given up writes late is nobody's checkpoint, and a step that is written again leaves the
files of the first time as they are until the row names the new ones. Whoever changes these files holds the job's lease.
They go when the job has succeeded, some time after it has failed or was cancelled (until then it can be retried), and
earlier when others need the room.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from reftserve.server.errors import QuotaExceeded
from reftserve.server.storage.blobs import BlobStore, map_enospc
from reftserve.server.storage.leases import Lease, LeaseLost, Leases
from reftserve.server.storage.tables import Job
from reftserve.server.training.job_repository import JobRepository

BLOBS = "jobs"


class JobFiles:
    """Files of all jobs. max_bytes: for all of them together; keep_s: seconds that an ended job keeps its own."""

    def __init__(self, blobs: BlobStore, log: JobRepository, leases: Leases, *, max_bytes: int, keep_s: float) -> None:
        self._blobs = blobs
        self._log = log
        self._leases = leases
        self._max_bytes = max_bytes
        self._keep_s = keep_s

    def data(self, job_id: str, name: str) -> Path | None:
        """The job's copy of a data set as a local path, or None when it has none."""
        key = f"{BLOBS}/{job_id}/{name}.jsonl"
        return self._blobs.local_file(key) if self._blobs.exists(key) else None

    def keep_data(self, job_id: str, name: str, source: Path) -> Path:
        """Copy a data set, so that the job goes on when the uploaded file is deleted; the copy.

        Raises QuotaExceeded or StorageFull.
        """
        key = f"{BLOBS}/{job_id}/{name}.jsonl"
        self._make_room(source.stat().st_size)
        self._blobs.put_file(key, source)
        return self._blobs.local_file(key)

    def newest_checkpoint(self, lease: Lease) -> Path | None:
        """The folder of the job's last durable step; None when it has to begin at the beginning.

        What a worker that was killed has left in the job's folder, and no row knows, is removed.
        """
        rows, folder = self._log.checkpoints(lease.job_id), f"{BLOBS}/{lease.job_id}"
        data = {f"{folder}/{name}.jsonl" for name in ("training", "validation")}
        self._blobs.sweep(folder, data | {row.path for row in rows if row.kept})
        for row in rows:
            if row.kept and self._blobs.exists(row.path):
                return self._blobs.local_folder(row.path)
            if row.kept:
                self._log.event(lease, f"The checkpoint at step {row.step} has gone from the store", level="warn")
        return None

    def write_checkpoint(
        self, lease: Lease, step: int, metrics: dict[str, object], write: Callable[[Path], None]
    ) -> None:
        """Make a step durable. write: writes its state into a folder.

        Raises QuotaExceeded or StorageFull, and LeaseLost; the checkpoint before is there as it was.
        """
        key = f"{BLOBS}/{lease.job_id}/checkpoint-{step}-{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            with map_enospc(f"the checkpoint at step {step}"):
                write(folder)
            self._make_room(sum(file.stat().st_size for file in folder.iterdir()))
            self._blobs.put_folder(key, folder)
        with self._blobs.delete_blob_on_error(key):
            gone = self._log.checkpoint(lease, step, key, metrics)
        for old in gone:
            self._blobs.delete(old)

    def sweep(self) -> list[str]:
        """Remove the files of jobs that ended long enough ago; the jobs' ids."""
        cutoff = time.time() - self._keep_s
        return [job.id for job in self._ended() if self._is_over(job, cutoff) and self.remove(job.id)]

    def remove(self, job_id: str) -> bool:
        """Remove an ended job's files; False when it lives again, or somebody else is at it."""
        lease = self._leases.take_ended(job_id)
        if lease is None:
            return False
        try:
            self._log.forget_checkpoints(lease)
            self._blobs.delete(f"{BLOBS}/{job_id}")
            self._log.release(lease)
        except LeaseLost:
            # So slow that another worker cleared up in the meantime.
            return False
        return True

    def _make_room(self, more: int) -> None:
        """See that `more` bytes fit, at the cost of ended jobs, the longest ended first."""
        used = self._blobs.size(BLOBS)
        if used + more <= self._max_bytes:
            return
        ended = {job.id: self._blobs.size(f"{BLOBS}/{job.id}") for job in self._ended()}
        living = used - sum(ended.values())
        if living + more > self._max_bytes:
            raise QuotaExceeded(
                f"{more} bytes are needed, and {living} of the {self._max_bytes} bytes for jobs are used by jobs that "
                "have not ended; wait for them, or raise max_jobs_bytes, and retry"
            )
        for job_id, size in ended.items():
            if used + more <= self._max_bytes:
                return
            used -= size if self.remove(job_id) else 0

    def _ended(self) -> list[Job]:
        return self._log.ended([key.rsplit("/", 1)[-1] for key in self._blobs.children(BLOBS)])

    def _is_over(self, job: Job, cutoff: float) -> bool:
        return job.status == "succeeded" or (job.finished_at or 0) < cutoff
