"""The files of a job in the blob store, which let any worker continue it: copies of its data, and its checkpoints.

    blobs / jobs / <id> / training.jsonl  validation.jsonl  checkpoint-<step>-<unique>/

Only the holder of the job's lease changes its files. A checkpoint exists once its row names its unique key, so files
that a fenced worker writes late belong to no row, and repeating a step leaves the first files until then. The row also
holds the files' checksums: a damaged checkpoint is passed over for the one before it. The files of a failed or
cancelled job stay for a retry: `keep_s` seconds, or until other jobs need the room.
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
from reftserve.server.storage.tables import Job, JobCheckpoint
from reftserve.server.training.checksums import checksums, find_damage
from reftserve.server.training.job_repository import JobRepository

BLOBS = "jobs"


class JobFiles:
    """The files of all jobs. max_bytes: their total budget; keep_s: seconds that those of an unsuccessful job stay."""

    def __init__(
        self, blobs: BlobStore, repository: JobRepository, leases: Leases[Job], *, max_bytes: int, keep_s: float
    ) -> None:
        self._blobs = blobs
        self._repository = repository
        self._leases = leases
        self._max_bytes = max_bytes
        self._keep_s = keep_s

    def data(self, job_id: str, name: str) -> Path | None:
        """Return the local path of the job's copy of a data set, or None if there is none."""
        key = f"{BLOBS}/{job_id}/{name}.jsonl"
        return self._blobs.local_file(key) if self._blobs.exists(key) else None

    def keep_data(self, job_id: str, name: str, source: Path) -> Path:
        """Copy a data set, so that the upload can be deleted; return the copy. Raises QuotaExceeded or StorageFull."""
        key = f"{BLOBS}/{job_id}/{name}.jsonl"
        self._make_room(source.stat().st_size)
        self._blobs.put_file(key, source)
        return self._blobs.local_file(key)

    def newest_checkpoint(self, lease: Lease[Job]) -> Path | None:
        """Return the folder of the newest whole checkpoint, or None. Also remove a killed worker's unrecorded files."""
        rows, folder = self._repository.checkpoints(lease.id), f"{BLOBS}/{lease.id}"
        data = {f"{folder}/{name}.jsonl" for name in ("training", "validation")}
        kept = [row for row in rows if row.kept]
        self._blobs.sweep(folder, data | {row.path for row in kept})
        for row in kept:
            fault = self._fault(row)
            if fault is None:
                return self._blobs.local_folder(row.path)
            self._repository.event(lease, f"The checkpoint at step {row.step} {fault}; it is not used", level="warn")
        if kept:
            self._repository.event(lease, "No checkpoint is whole; the job starts again", level="warn")
        return None

    def write_checkpoint(
        self, lease: Lease[Job], step: int, metrics: dict[str, object], write: Callable[[Path], None]
    ) -> None:
        """Store the folder that `write` fills. QuotaExceeded, StorageFull or LeaseLost keep the previous checkpoint."""
        key = f"{BLOBS}/{lease.id}/checkpoint-{step}-{uuid.uuid4().hex}"
        with map_enospc(f"the checkpoint at step {step}"), tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write(folder)
            self._make_room(sum(file.stat().st_size for file in folder.iterdir()))
            files = checksums(folder)
            self._blobs.put_folder(key, folder)
        with self._blobs.delete_blob_on_error(key):
            outdated = self._repository.checkpoint(lease, step, key, files, metrics)
        for old in outdated:
            self._blobs.delete(old)

    def sweep(self) -> list[str]:
        """Remove the files of succeeded jobs, and of others that ended over `keep_s` ago; return the jobs' ids."""
        cutoff = time.time() - self._keep_s
        return [job.id for job in self._ended_jobs() if self._has_expired(job, cutoff) and self.remove(job.id)]

    def remove(self, job_id: str) -> bool:
        """Remove an ended job's files; return False if the job was retried or its lease is held."""
        lease = self._leases.take_ended(job_id)
        if lease is None:
            return False
        try:
            try:
                self._repository.forget_checkpoints(lease)
                self._blobs.delete(f"{BLOBS}/{job_id}")
            finally:
                # Also after an error of the store: the worker renews all its leases, so this one would never end.
                self._repository.release(lease)
        except LeaseLost:
            # The lease expired meanwhile, so another worker removes the files.
            return False
        return True

    def _fault(self, row: JobCheckpoint) -> str | None:
        if not self._blobs.exists(row.path):
            return "is missing from the store"
        return None if row.files is None else find_damage(self._blobs.local_folder(row.path), row.files)

    def _make_room(self, more: int) -> None:
        """Remove the files of ended jobs, the longest ended first, until `more` bytes fit. Raises QuotaExceeded."""
        used = self._blobs.size(BLOBS)
        if used + more <= self._max_bytes:
            return
        ended = {job.id: self._blobs.size(f"{BLOBS}/{job.id}") for job in self._ended_jobs()}
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

    def _ended_jobs(self) -> list[Job]:
        return self._repository.ended([key.rsplit("/", 1)[-1] for key in self._blobs.children(BLOBS)])

    def _has_expired(self, job: Job, cutoff: float) -> bool:
        return job.status == "succeeded" or (job.finished_at or 0) < cutoff
