"""The rows of jobs, of their events and of their checkpoints.

Methods with a lease raise LeaseLost once the job has changed hands. Functions at the end need the job's row locked.
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
from reftserve.server.storage.leases import Lease, release_lease, require_lease
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent

logger = logging.getLogger(__name__)
KEPT_CHECKPOINTS = 2
EVENTS_AT_ONCE = 500


class JobRepository:
    """Reads and writes jobs; each method is one transaction."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, job_id: str, owner: str | None = None) -> Job:
        """Return a job's row. Raises NotFound, also if the job belongs to another owner than the one given."""
        with self._database.reading() as session:
            job = session.get(Job, job_id)
        if job is None or owner not in (None, job.owner):
            raise NotFound(f"no fine-tuning job {job_id!r}", param="fine_tuning_job_id", code="job_not_found")
        return job

    def create(self, job: Job, message: str) -> None:
        """Insert a job together with its first event."""
        with self._database.session() as session:
            session.add(job)
            session.flush()
            append_event(session, job, message)

    def events(self, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
        """Return up to `limit` events numbered below `before`, newest first."""
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number.desc()).limit(limit)
        if before is not None:
            query = query.where(JobEvent.number < before)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def steps(self, job_id: str) -> list[dict[str, Any]]:
        """Return the metrics of each step; a step that was repeated after a crash has those of the last time."""
        query = select(JobEvent.data).where(JobEvent.job_id == job_id, JobEvent.type == "metrics")
        by_step: dict[int, dict[str, Any]] = {}
        with self._database.reading() as session:
            for data in session.scalars(query.order_by(JobEvent.number).execution_options(yield_per=EVENTS_AT_ONCE)):
                if data is not None and "step" in data:
                    earlier = data.pop("earlier", [])
                    by_step |= {step["step"]: step for step in (*earlier, data)}
        return [by_step[step] for step in sorted(by_step)]

    def checkpoints(self, job_id: str) -> list[JobCheckpoint]:
        """Return all checkpoints, newest first, including those whose files were removed."""
        query = select(JobCheckpoint).where(JobCheckpoint.job_id == job_id).order_by(JobCheckpoint.step.desc())
        with self._database.reading() as session:
            return list(session.scalars(query))

    def ended(self, job_ids: Sequence[str]) -> list[Job]:
        """Return the jobs among `job_ids` that have ended, the longest ended first."""
        query = select(Job).where(Job.id.in_(job_ids), Job.status.in_(Job.ENDED)).order_by(Job.finished_at, Job.id)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def pause_requested(self, lease: Lease[Job]) -> bool:
        """Return whether the owner has asked for a pause. Polled at every step, it also detects a lost lease."""
        with self._database.reading() as session:
            return require_lease(session, lease, lock=False).pause_requested

    def event(
        self, lease: Lease[Job], message: str, *, level: str = "info", data: dict[str, Any] | None = None
    ) -> None:
        """Append an event; with data its type is `metrics`."""
        with self._database.session() as session:
            append_event(session, require_lease(session, lease), message, level=level, data=data)

    def progress(self, lease: Lease[Job], message: str, data: dict[str, Any], *, estimated_finish: int) -> None:
        """Record steps: their metrics event and the job's estimated finish (Unix seconds)."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            job.estimated_finish = estimated_finish
            append_event(session, job, message, data=data)

    def checkpoint(
        self, lease: Lease[Job], step: int, path: str, files: dict[str, str], metrics: dict[str, Any]
    ) -> list[str]:
        """Record a checkpoint and reset the attempts; return the paths of checkpoints that the caller must delete."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            job.attempts = 0
            query = select(JobCheckpoint).where(JobCheckpoint.job_id == job.id, JobCheckpoint.kept)
            kept = list(session.scalars(query.order_by(JobCheckpoint.step.desc())))
            older = [row for row in kept if row.step < step]
            replaced = [row for row in kept if row not in older[: KEPT_CHECKPOINTS - 1]]
            paths = [row.path for row in replaced]
            for row in replaced:
                row.kept = False
            session.merge(
                JobCheckpoint(
                    job_id=job.id,
                    step=step,
                    owner=job.owner,
                    path=path,
                    kept=True,
                    files=files,
                    metrics=metrics,
                    created_at=int(time.time()),
                )
            )
            return paths

    def prepared(self, lease: Lease[Job], plan: dict[str, Any], report: dict[str, Any], data: dict[str, Any]) -> Job:
        """Record a job's plan, the report on its files and its encoded data; return the job, which now runs."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            job.status, job.data_report, job.data = Job.RUNNING, report, data
            job.plan = job.plan or plan  # data that is made again changes no decision
            return job

    def forget_files(self, lease: Lease[Job]) -> None:
        """Mark encoded data and all checkpoints of the job as removed; the caller then deletes their files."""
        with self._database.session(may_use_reserve=True) as session:
            job = require_lease(session, lease)
            job.data = None
            session.execute(update(JobCheckpoint).where(JobCheckpoint.job_id == job.id).values(kept=False))

    def release(self, lease: Lease[Job]) -> None:
        """Give the lease back and leave the job's status as it is."""
        with self._database.session(may_use_reserve=True) as session:
            release_lease(require_lease(session, lease))

    def pause(self, lease: Lease[Job], message: str) -> bool:
        """Pause the job and release its lease; return False if the request for the pause was withdrawn."""
        with self._database.session() as session:
            job = require_lease(session, lease)
            if not job.pause_requested:
                return False
            pause_job(session, job, message)
            return True

    def end(self, lease: Lease[Job], status: str, message: str, *, level: str = "info", **fields: Any) -> None:
        """Give the job its final status with an event, and release its lease."""
        with self._database.session() as session:
            finish(session, require_lease(session, lease), status, message, level=level, **fields)


def append_event(
    session: Session, job: Job, message: str, *, level: str = "info", data: dict[str, Any] | None = None
) -> None:
    """Append an event; the row lock makes its number unique. Events without data also go to the log."""
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
    """Queue a job again, with its count of attempts reset."""
    job.status = Job.VALIDATING if job.data is None else "queued"
    job.pause_requested = False
    job.attempts = 0
    append_event(session, job, message)


def pause_job(session: Session, job: Job, message: str) -> None:
    """Pause a job and release its lease."""
    job.status = "paused"
    job.pause_requested = False
    job.estimated_finish = None
    release_lease(job)
    append_event(session, job, message)


def finish(session: Session, job: Job, status: str, message: str, *, level: str = "info", **fields: Any) -> None:
    """End a job and release its lease. fields: further columns to set."""
    job.status = status
    job.finished_at = int(time.time())
    job.pause_requested = False
    job.estimated_finish = None
    for name, value in fields.items():
        setattr(job, name, value)
    release_lease(job)
    append_event(session, job, message, level=level)
