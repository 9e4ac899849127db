"""What is written about a job while it lives: its row's progress, its events, its checkpoints.

What a run writes, it writes under its lease; each of these methods raises LeaseLost, with nothing written, when the job
has changed hands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from reftserve.server.errors import NotFound
from reftserve.server.storage.database import Database
from reftserve.server.storage.leases import ENDED, Lease, release_lease, require_lease
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent

logger = logging.getLogger(__name__)
KEPT_CHECKPOINTS = 2


class JobRepository:
    """Reads and writes the rows of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """A job's row; with an owner, only theirs.

        Raises NotFound.
        """
        with self._database.reading() as session:
            job = session.get(Job, job_id)
        if job is None or owner not in (None, job.owner):
            raise NotFound(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id", code="job_not_found")
        return job

    def create(self, job: Job, message: str) -> None:
        """A new job with its first event, in one transaction: no worker sees the one without the other."""
        with self._database.session() as session:
            session.add(job)
            session.flush()
            append_event(session, job, message)

    def events(self, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
        """Up to `limit` events, newest first, that are older than number `before`."""
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number.desc()).limit(limit)
        if before is not None:
            query = query.where(JobEvent.number < before)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def checkpoints(self, job_id: str) -> list[JobCheckpoint]:
        """Checkpoints, newest first; also those whose state is no longer kept."""
        query = select(JobCheckpoint).where(JobCheckpoint.job_id == job_id).order_by(JobCheckpoint.step.desc())
        with self._database.reading() as session:
            return list(session.scalars(query))

    def ended(self, job_ids: Sequence[str]) -> list[Job]:
        """Those of the jobs that have ended, the longest ended first."""
        query = select(Job).where(Job.id.in_(job_ids), Job.status.in_(ENDED)).order_by(Job.finished_at, Job.id)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def pause_requested(self, lease: Lease) -> bool:
        """Whether someone wants the job to rest; the poll of every step, which also finds a lease lost."""
        with self._database.reading() as session:
            return require_lease(session, lease).pause_requested

    def event(self, lease: Lease, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Append an event; one with data is of type `metrics`."""
        with self._database.session() as session:
            append_event(session, require_lease(session, lease), message, level=level, data=data)

    def progress(self, lease: Lease, message: str, data: dict[str, Any], *, estimated_finish: int) -> None:
        """A step was done: its event, and when the job is likely to end (Unix seconds)."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            job.estimated_finish = estimated_finish
            append_event(session, job, message, data=data)

    def checkpoint(self, lease: Lease, step: int, path: str, metrics: dict[str, Any]) -> list[str]:
        """Record a durable step; paths of older ones, which are no longer kept."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            job.attempts = 0
            query = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.kept)
            kept = list(session.scalars(query.order_by(JobCheckpoint.step.desc())))
            older = [row for row in kept if row.step < step]
            gone = [row for row in kept if row not in older[: KEPT_CHECKPOINTS - 1]]
            paths = [row.path for row in gone]
            for row in gone:
                row.kept = False
            row = JobCheckpoint(job_id=job.id, step=step, owner=job.owner, path=path, kept=True, metrics=metrics)
            row.created_at = int(time.time())
            session.merge(row)
            return paths

    def forget_checkpoints(self, lease: Lease) -> None:
        """The state of the job's checkpoints is about to be removed."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            session.execute(update(JobCheckpoint).where(JobCheckpoint.job_id == job.id).values(kept=False))

    def release(self, lease: Lease) -> None:
        """Give the lease back; the job stays as it is."""
        with self._database.session() as session:
            release_lease(require_lease(session, lease))

    def pause(self, lease: Lease, message: str) -> bool:
        """The job rests, and is nobody's; False when the pause has been withdrawn, and the job goes on."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            if not job.pause_requested:
                return False
            pause_job(session, job, message)
            return True

    def end(self, lease: Lease, status: str, message: str, *, level: str = "info", **fields: Any) -> None:
        """Give the job its final status, with an event that says so; it is nobody's any more."""
        with self._database.session() as session:
            finish(session, require_lease(session, lease), status, message, level=level, **fields)


def append_event(
    session: Session, job: Job, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """Append an event in a transaction that has the job's row for itself."""
    if data is None:
        logger.log(logging.INFO if level == "info" else logging.WARNING, "job %s: %s", job.id, message)
    last = session.scalar(select(func.max(JobEvent.number)).where(JobEvent.job_id == job.id))
    session.add(
        JobEvent(
            job_id=job.id,
            number=(last or 0) + 1,
            owner=job.owner,
            level=level,
            type="message" if data is None else "metrics",
            message=message,
            data=data,
            created_at=int(time.time()),
        )
    )


def queue(session: Session, job: Job, message: str) -> None:
    """Let a job wait for a worker again, in a transaction that has its row for itself."""
    job.status = "queued"
    job.pause_requested = False
    job.attempts = 0
    append_event(session, job, message)


def pause_job(session: Session, job: Job, message: str) -> None:
    """Pause a job, in a transaction that has its row for itself."""
    job.status = "paused"
    job.pause_requested = False
    job.estimated_finish = None
    release_lease(job)
    append_event(session, job, message)


def finish(session: Session, job: Job, status: str, message: str, *, level: str = "info", **fields: Any) -> None:
    """End a job, in a transaction that has its row for itself. fields: further columns."""
    job.status = status
    job.finished_at = int(time.time())
    job.pause_requested = False
    job.estimated_finish = None
    for name, value in fields.items():
        setattr(job, name, value)
    release_lease(job)
    append_event(session, job, message, level=level)
