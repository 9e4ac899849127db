"""Who runs a job: one worker at a time, for as long as it gives signs of life.

A worker takes a job together with a lease that runs out unless it is renewed, and a fence: a number that grows with
each change of hands. Every write of a run compares the fence in its own transaction, so a worker that was given up for
dead and wakes up finds its lease lost before it can write, or publish, anything.

    queued ──take──► running ─release─► succeeded, failed, cancelled, paused
                     ▲     │
                     └─take┘  by another worker, once the lease has run out

Leases are renewed by a thread, not by the steps: a step may take longer than a lease. A trainer that hangs therefore
keeps its job until its process ends or somebody cancels the job, which needs no answer from the worker.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from dataclasses import dataclass

from sqlalchemy import ColumnElement, or_, select, update
from sqlalchemy.orm import Session

from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Job

ENDED = ("succeeded", "failed", "cancelled")


class LeaseLost(Exception):
    """The job is no longer this worker's: it was paused, cancelled or taken over. Nothing was written."""


@dataclass(frozen=True)
class Lease:
    """The right to run a job until it changes hands. attempt: how often it was taken since its last checkpoint."""

    job_id: str
    fence: int
    attempt: int


def worker_id() -> str:
    """A name for this process that no other has, now or later."""
    return f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


class Leases:
    """The leases of one worker. lease_s: seconds that one lasts without being renewed."""

    def __init__(self, database: Database, worker: str, *, lease_s: float) -> None:
        self._database = database
        self._worker = worker
        self._lease_s = lease_s

    def take(self) -> Lease | None:
        """The oldest job that waits, or whose worker has given no sign of life; None when there is none."""
        with self._database.session() as session:
            now = self._database.now(session)
            query = (
                select(Job)
                .where(Job.status.in_(("queued", "running")), is_free(now))
                .order_by(Job.created_at, Job.id)
                .limit(1)
                .with_for_update(skip_locked=True)
            )
            job = session.scalar(query)
            if job is None:
                return None
            job.status = "running"
            job.started_at = job.started_at or int(time.time())
            job.attempts += 1
            return self._lend(job, now)

    def take_ended(self, job_id: str) -> Lease | None:
        """A job that has ended, to clear up after it; None when it lives, or somebody else is at it."""
        with self._database.session() as session:
            now = self._database.now(session)
            query = select(Job).where(Job.id == job_id, Job.status.in_(ENDED), is_free(now))
            job = session.scalar(query.with_for_update(skip_locked=True))
            return None if job is None else self._lend(job, now)

    def renew(self) -> None:
        """A sign of life: all leases of this worker last anew."""
        with self._database.session() as session:
            expires_at = self._database.now(session) + self._lease_s
            session.execute(update(Job).where(Job.lease_worker == self._worker).values(lease_expires_at=expires_at))

    def release(self, *, in_order: bool = True) -> None:
        """Give all leases back, so that another worker need not wait for their end.

        in_order: that the worker leaves was no fault of the jobs, so the attempt does not count.
        """
        with self._database.session() as session:
            for job in session.scalars(select(Job).where(Job.lease_worker == self._worker).with_for_update()):
                release_lease(job)
                if in_order:
                    job.attempts = max(0, job.attempts - 1)

    def _lend(self, job: Job, now: float) -> Lease:
        job.fence += 1
        job.lease_worker = self._worker
        job.lease_expires_at = now + self._lease_s
        return Lease(job.id, job.fence, job.attempts)


def require_lease(session: Session, lease: Lease) -> Job:
    """The lease's job, which nobody else can change before this transaction ends.

    Raises LeaseLost when it has changed hands.
    """
    job = session.get_one(Job, lease.job_id, with_for_update=True)
    if job.fence != lease.fence:
        raise LeaseLost(f"job {job.id} has changed hands: fence {job.fence}, and this run has {lease.fence}")
    return job


def release_lease(job: Job) -> None:
    """Nobody runs the job any more; whoever did finds the lease lost at its next write."""
    job.fence += 1
    job.lease_worker = None
    job.lease_expires_at = None


def is_held(job: Job, now: float) -> bool:
    """Whether a worker runs the job."""
    return job.lease_expires_at is not None and job.lease_expires_at >= now


def is_free(now: float) -> ColumnElement[bool]:
    """Jobs that nobody runs, or whose lease has run out."""
    return or_(Job.lease_worker.is_(None), Job.lease_expires_at < now)
