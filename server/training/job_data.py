"""The data of jobs: a job's first durable step reads and encodes its files once; every later run reads the result.

The job's row has the folder of the encoded files and their checksums in `data`: {"path", "files", "hash"}. Lost or
damaged ones are made again from the uploads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from reftserve.client.schemas import Method
from reftserve.server.base.folder import Base
from reftserve.server.datasets import EncodedExample, Splits, dataset_hash, split
from reftserve.server.datasets.file_store import FileStore
from reftserve.server.storage.leases import Lease
from reftserve.server.storage.tables import Job
from reftserve.server.training.encoded_file import read_encoded, write_encoded
from reftserve.server.training.job_files import JobFiles
from reftserve.server.training.job_repository import JobRepository
from reftserve.server.training.preparation import TRAINING, VALIDATION, Preparation, prepare

POLL_S = 0.5


class JobData:
    """The encoded data of a worker's jobs."""

    def __init__(self, base: Base, uploads: FileStore, files: JobFiles, repository: JobRepository) -> None:
        self._base = base
        self._uploads = uploads
        self._files = files
        self._repository = repository

    def prepared(self, lease: Lease[Job], job: Job, poll: Callable[[], object]) -> Job:
        """Return the job with plan and encoded data, made now unless an earlier run has made them.

        poll: called now and then; may raise. Raises NotFound, InvalidRequest, QuotaExceeded, StorageFull or LeaseLost.
        """
        if job.data is not None:
            fault = self._files.find_fault(job.data["path"], job.data["files"])
            if fault is None:
                return job
            self._repository.event(lease, f"The job's encoded data {fault}; it is made again", level="warn")
        sources = self._sources(job)
        found = prepare(self._base, _method(job), sources, seed=job.seed, poll=_at_intervals(poll))
        self._warn_of_long_examples(lease, found)

        def write(folder: Path) -> None:
            for name, file in found.data.items():
                write_encoded(folder / f"{name}.safetensors", file.fitting)

        def record(path: str, files: dict[str, str]) -> Job:
            data = {"path": path, "files": files, "hash": dataset_hash(list(sources.values()))}
            return self._repository.prepared(lease, found.plan.model_dump(), found.report.model_dump(), data)

        return self._files.write_data(lease, write, record)

    def splits(self, job: Job) -> Splits:
        """Return the examples of a prepared job that train, select and score."""
        training, validation = (self._read(job, name) for name in (TRAINING, VALIDATION))
        assert training is not None  # noqa: S101 - every job has training data
        return split(training, validation, seed=job.seed)

    def _read(self, job: Job, name: str) -> list[EncodedExample] | None:
        data = job.data or {}
        file = f"{name}.safetensors"
        return read_encoded(self._files.folder(data["path"]) / file) if file in data["files"] else None

    def _sources(self, job: Job) -> dict[str, Path]:
        sources = {}
        for name, file_id in ((TRAINING, job.training_file), (VALIDATION, job.validation_file)):
            if file_id is not None:
                param = f"{name}_file"
                row = self._uploads.get(job.owner, file_id, param=param)
                sources[name] = self._uploads.path(row, param=param)
        return sources

    def _warn_of_long_examples(self, lease: Lease[Job], found: Preparation) -> None:
        for name, file in found.data.items():
            left_out = len(file.encoded) - len(file.fitting)
            if left_out:
                self._repository.event(
                    lease,
                    f"{name}: left out {left_out} of {len(file.encoded)} examples that are longer than max_length, "
                    f"{found.report.max_length} tokens",
                    level="warn",
                )


def _method(job: Job) -> Method | None:
    return None if job.method is None else Method.model_validate(job.method)


def _at_intervals(poll: Callable[[], object]) -> Callable[[], None]:
    """Return a function that calls `poll` at most once in POLL_S."""
    polled_at = time.monotonic()

    def polled() -> None:
        nonlocal polled_at
        if time.monotonic() - polled_at >= POLL_S:
            poll()
            polled_at = time.monotonic()

    return polled
