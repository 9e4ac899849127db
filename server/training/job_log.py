"""What is written about a job while it lives: its row's progress, its events, its checkpoints."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from reftserve.server.errors import NotFound
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent

logger = logging.getLogger(__name__)
ENDED = ("succeeded", "failed", "cancelled")


class JobLog:
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

    def update(self, job_id: str, **fields: Any) -> None:
        """Set columns of the job's row."""
        with self._database.session() as session:
            job = session.get_one(Job, job_id)
            for name, value in fields.items():
                setattr(job, name, value)

    def start(self, job_id: str) -> bool:
        """Move a queued job to running; False when it has been cancelled instead."""
        with self._database.session() as session:
            job = session.get_one(Job, job_id)
            if job.status in ENDED:
                return False
            job.status = "running"
            job.started_at = job.started_at or int(time.time())
        return True

    def end(self, job_id: str, status: str, message: str, *, level: str = "info", **fields: Any) -> None:
        """Give the job its final status, with an event that says so, in one transaction: no watcher misses it."""
        final = {"status": status, "finished_at": int(time.time()), "estimated_finish": None, **fields}
        with self._database.session() as session:
            job = session.get_one(Job, job_id)
            for name, value in final.items():
                setattr(job, name, value)
            self._append(session, job, message, level, None)

    def queued(self) -> Sequence[str]:
        """Ids of jobs that wait for a worker, oldest first."""
        query = select(Job.id).where(Job.status == "queued").order_by(Job.created_at, Job.id)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def cancel_requested(self, job_id: str) -> bool:
        """Whether someone wants the job to stop."""
        with self._database.reading() as session:
            return bool(session.scalar(select(Job.cancel_requested).where(Job.id == job_id)))

    def create(self, job: Job, message: str) -> None:
        """A new job with its first event, in one transaction: no worker sees the one without the other."""
        with self._database.session() as session:
            session.add(job)
            session.flush()
            self._append(session, job, message, "info", None)

    def event(self, job_id: str, message: str, *, level: str = "info", data: dict[str, Any] | None = None) -> None:
        """Append an event; one with data is of type `metrics`."""
        with self._database.session() as session:
            self._append(session, session.get_one(Job, job_id), message, level, data)

    def note(self, session: Session, job: Job, message: str) -> None:
        """Append an event within a transaction of the caller's."""
        self._append(session, job, message, "info", None)

    def events(self, job_id: str, *, before: int | None, limit: int) -> list[JobEvent]:
        """Up to `limit` events, newest first, that are older than number `before`."""
        query = select(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.number.desc()).limit(limit)
        if before is not None:
            query = query.where(JobEvent.number < before)
        with self._database.reading() as session:
            return list(session.scalars(query))

    def checkpoint(self, job_id: str, step: int, path: str, metrics: dict[str, Any]) -> None:
        """Record a durable step; again after a crash replaces it."""
        with self._database.session() as session:
            session.merge(
                JobCheckpoint(
                    job_id=job_id,
                    step=step,
                    owner=session.get_one(Job, job_id).owner,
                    path=path,
                    metrics=metrics,
                    created_at=int(time.time()),
                )
            )

    def checkpoints(self, job_id: str) -> list[JobCheckpoint]:
        """Checkpoints, newest first."""
        query = select(JobCheckpoint).where(JobCheckpoint.job_id == job_id).order_by(JobCheckpoint.step.desc())
        with self._database.reading() as session:
            return list(session.scalars(query))

    def _append(self, session: Session, job: Job, message: str, level: str, data: dict[str, Any] | None) -> None:
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
