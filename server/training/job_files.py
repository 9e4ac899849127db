"""The files of a job in the blob store, which let any worker continue it: its encoded data, and its checkpoints.

    blobs / jobs / <id> / data-<unique>/  checkpoint-<step>-<unique>/

Only the holder of the job's lease changes its files. A folder exists once a row names its unique key, so files that a
fenced worker writes late belong to no row, and repeating a step leaves the first files until then. The row also holds
the files' checksums: a damaged checkpoint is passed over for the one before it. The files of a failed or cancelled job
stay for a retry: `keep_s` seconds, or until other jobs need the room.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from reftserve.server.errors import QuotaExceeded
from reftserve.server.storage.blobs import BlobStore, map_enospc
from reftserve.server.storage.leases import Lease, LeaseLost, Leases
from reftserve.server.storage.tables import Job
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

    def write_data(
        self, lease: Lease[Job], write: Callable[[Path], None], record: Callable[[str, dict[str, str]], Job]
    ) -> Job:
        """Store the folder that `write` fills with encoded data, and return the result of `record(key, checksums)`.

        Raises QuotaExceeded, StorageFull or LeaseLost; nothing then stays in the store.
        """
        key, files = self._store(f"{BLOBS}/{lease.id}/data-{uuid.uuid4().hex}", "the job's encoded data", write)
        with self._blobs.delete_blob_on_error(key):
            return record(key, files)

    def folder(self, key: str) -> Path:
        """Return the local path of a stored folder."""
        return self._blobs.local_folder(key)

    def find_fault(self, key: str, files: Mapping[str, str]) -> str | None:
        """Return the fault of a stored folder, as the end of a sentence; None if it is whole."""
        if not self._blobs.exists(key):
            return "is missing from the store"
        fault = find_damage(self._blobs.local_folder(key), files)
        if fault is not None and self._blobs.drop_copy(key):
            fault = find_damage(self._blobs.local_folder(key), files)
        return fault

    def newest_checkpoint(self, lease: Lease[Job]) -> Path | None:
        """Return the folder of the newest whole checkpoint, or None. Also remove a killed worker's unrecorded files."""
        kept = [row for row in self._repository.checkpoints(lease.id) if row.kept]
        data = self._repository.get(lease.id).data
        recorded = {row.path for row in kept} | ({data["path"]} if data else set())
        for key in self._blobs.children(f"{BLOBS}/{lease.id}"):
            if key not in recorded:
                self._blobs.discard(key)  # however new: only this lease's holder may still record a folder
        for row in kept:
            fault = self.find_fault(row.path, row.files or {})
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
        key, files = self._store(
            f"{BLOBS}/{lease.id}/checkpoint-{step}-{uuid.uuid4().hex}", f"the checkpoint at step {step}", write
        )
        with self._blobs.delete_blob_on_error(key):
            outdated = self._repository.checkpoint(lease, step, key, files, metrics)
        for old in outdated:
            self._blobs.discard(old)

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
                self._repository.forget_files(lease)
                self._blobs.delete(f"{BLOBS}/{job_id}")
            finally:
                # Also after an error of the store: the worker renews all its leases, so this one would never end.
                self._repository.release(lease)
        except LeaseLost:
            # The lease expired meanwhile, so another worker removes the files.
            return False
        return True

    def _store(self, key: str, content: str, write: Callable[[Path], None]) -> tuple[str, dict[str, str]]:
        with map_enospc(content), tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write(folder)
            self._make_room(sum(file.stat().st_size for file in folder.iterdir()))
            files = checksums(folder)
            self._blobs.put_folder(key, folder)
        return key, files

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
