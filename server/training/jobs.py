"""The jobs of the API: create, list, retrieve, cancel, events, checkpoints. Training itself is the worker's.

A job exists once its row is committed with status `queued`; the worker finds it there. No second write is needed, so
an acknowledged job can not be lost between two stores.
"""

from __future__ import annotations

import secrets
import time

from sqlalchemy import select

from reftserve.client.schemas import DataReport, FineTuningJobCreate
from reftserve.server.base_model import Base
from reftserve.server.errors import Conflict, InvalidRequest, NotFound
from reftserve.server.registry.files import TRAINING
from reftserve.server.registry.names import check_name
from reftserve.server.registry.store import Store
from reftserve.server.storage.tables import File, Job, JobCheckpoint, JobEvent
from reftserve.server.training.data import make_report
from reftserve.server.training.job_log import ENDED, JobLog
from reftserve.server.training.recipe import Plan, make_plan


class JobService:
    """Jobs of all owners that train on one base."""

    def __init__(self, store: Store, base: Base) -> None:
        self._store = store
        self._base = base
        self.log = JobLog(store.database)

    def create(self, owner: str, request: FineTuningJobCreate) -> Job:
        """Check everything that can be checked now, and queue the job.

        Raises InvalidRequest or NotFound, naming the field.
        """
        plan, report = self._checked(owner, request)
        # Times are kept in seconds; ids that sort by creation decide who was first within one.
        identity = f"{time.time_ns():016x}{secrets.token_hex(8)}"
        job = Job(
            id=f"ftjob-{identity}",
            owner=owner,
            status="queued",
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            suffix=request.suffix or f"intervention-{identity[-8:]}",
            method=request.method.model_dump(exclude_none=True) if request.method else None,
            plan=plan.model_dump(),
            data_report=report.model_dump(),
            seed=_seed(request),
            job_metadata=request.metadata,
            cancel_requested=False,
            result_files=[],
            created_at=int(time.time()),
        )
        self.log.create(job, f"Created job {job.id} for intervention {job.suffix!r}")
        return job

    def validate(self, owner: str, request: FineTuningJobCreate) -> DataReport:
        """Check all that `create` checks, and queue nothing.

        Raises InvalidRequest or NotFound, naming the field.
        """
        return self._checked(owner, request)[1]

    def get(self, owner: str, job_id: str) -> Job:
        """One job.

        Raises NotFound.
        """
        return self.log.get(job_id, owner)

    def list_page(self, owner: str, *, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Jobs, newest first, after the one with id `after`; and whether there are more."""
        query = select(Job).where(Job.owner == owner).order_by(Job.created_at.desc(), Job.id.desc())
        with self._store.database.reading() as session:
            jobs = list(session.scalars(query))
        if after is not None:
            self.get(owner, after)
            jobs = jobs[[job.id for job in jobs].index(after) + 1 :]
        return jobs[:limit], len(jobs) > limit

    def cancel(self, owner: str, job_id: str) -> Job:
        """Stop a job: at once when it waits, before its next optimizer step when it runs.

        Raises NotFound, or Conflict when it has ended.
        """
        self.get(owner, job_id)
        with self._store.database.session() as session:
            job = session.get_one(Job, job_id)
            if job.status in ENDED:
                raise Conflict(f"job {job_id} has {job.status} and cannot be cancelled", code="job_ended")
            job.cancel_requested = True
            waiting = job.status == "queued"
            if waiting:
                job.status = "cancelled"
                job.finished_at = int(time.time())
        if waiting:
            self.log.event(job_id, "The job was cancelled before it began")
        return self.get(owner, job_id)

    def events(self, owner: str, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """Events, newest first, after the one with id `after`; and whether there are more."""
        self.get(owner, job_id)
        before = None if after is None else event_number(after)
        events = self.log.events(job_id, before=before, limit=limit + 1)
        return events[:limit], len(events) > limit

    def checkpoints(self, owner: str, job_id: str) -> list[JobCheckpoint]:
        """Durable steps, newest first."""
        self.get(owner, job_id)
        return self.log.checkpoints(job_id)

    def _checked(self, owner: str, request: FineTuningJobCreate) -> tuple[Plan, DataReport]:
        """What a job would do, and what it would learn from."""
        if request.model != self._base.name:
            raise NotFound(
                f"model {request.model!r} cannot be trained; the base is {self._base.name!r}",
                param="model",
                code="model_not_found",
            )
        training = self._data_file(owner, request.training_file, "training_file")
        validation = None
        if request.validation_file is not None:
            validation = self._data_file(owner, request.validation_file, "validation_file")
        plan = make_plan(
            request.method,
            request.hyperparameters,
            self._base.fingerprint,
            examples=training.examples or 0,
            max_context=self._base.max_context,
        )
        if request.suffix:
            check_name(request.suffix, "suffix")
        report = make_report(
            self._base.tokenizer,
            self._store.files.path(training),
            None if validation is None else self._store.files.path(validation),
            max_length=plan.max_length,
            seed=_seed(request),
        )
        return plan, report

    def _data_file(self, owner: str, file_id: str, param: str) -> File:
        file = self._store.files.get(owner, file_id, param=param)
        if file.purpose != TRAINING:
            raise InvalidRequest(
                f"{param} {file_id} has purpose {file.purpose!r}; expected {TRAINING!r}",
                param=param,
                code="invalid_file",
            )
        return file


def _seed(request: FineTuningJobCreate) -> int:
    return request.seed if request.seed is not None else 0


def event_id(event: JobEvent) -> str:
    """An event's id on the wire."""
    return f"ftevent-{event.job_id.removeprefix('ftjob-')}-{event.number}"


def event_number(identity: str) -> int:
    """An event's number, from its id.

    Raises InvalidRequest when it is not one.
    """
    number = identity.rpartition("-")[2]
    if not identity.startswith("ftevent-") or not number.isdecimal():
        raise InvalidRequest(f"after is {identity!r}; expected the id of an event", param="after")
    return int(number)
