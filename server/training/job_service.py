"""The jobs of the API. A job exists once its row is committed; workers find it by that row, and check its files."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from reftserve.client.schemas import DataReport, FineTuningJobCreate, Method
from reftserve.server.base.folder import Base
from reftserve.server.datasets.file_store import TRAINING as FINE_TUNE
from reftserve.server.errors import Conflict, InvalidRequest, NotFound
from reftserve.server.registry.names import check_free, check_name
from reftserve.server.registry.store import Store
from reftserve.server.storage.leases import is_held
from reftserve.server.storage.pages import has_metadata, read_page
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent
from reftserve.server.training.data_check import DataCheck
from reftserve.server.training.event_feed import EventFeed
from reftserve.server.training.job_repository import JobRepository, finish, pause_job, queue
from reftserve.server.training.preparation import TRAINING, VALIDATION, require_plan
from reftserve.server.training.recipe import requested_method

MAX_DIGITS = 9  # of an event's number: fits a 32-bit integer column


class JobService:
    """The jobs of all owners, on one base. data_check: reports on data sets for `validate`."""

    def __init__(self, store: Store, base: Base, data_check: DataCheck) -> None:
        self._store = store
        self._base = base
        self.repository = JobRepository(store.database)
        self._feed = EventFeed(store.database)
        self._data_check = data_check

    def create(self, owner: str, request: FineTuningJobCreate) -> Job:
        """Check the request and queue the job, which then checks its data. Raises InvalidRequest or NotFound."""
        _, method = self._check(owner, request)
        # `created_at` has whole seconds. Ids begin with the time in ns, so they order the jobs within a second.
        identity = f"{time.time_ns():016x}{secrets.token_hex(8)}"
        job = Job(
            id=f"ftjob-{identity}",
            owner=owner,
            status=Job.VALIDATING,
            model=request.model,
            training_file=request.training_file,
            validation_file=request.validation_file,
            suffix=request.suffix or f"intervention-{identity[-8:]}",
            method=method.model_dump(exclude_none=True) if method else None,
            plan={},
            seed=_seed(request),
            job_metadata=request.metadata,
            base=self._base.fingerprint.model_dump(),
            result_files=[],
            created_at=int(time.time()),
        )
        self.repository.create(job, f"Created job {job.id} for intervention {job.suffix!r}")
        return job

    def validate(self, owner: str, request: FineTuningJobCreate) -> DataReport:
        """Check a request and its data as a job does, but queue nothing; return the report on the data.

        Raises InvalidRequest or NotFound, naming the field, or Overloaded.
        """
        files, method = self._check(owner, request)
        return self._data_check.report(method, files, seed=_seed(request))

    def get(self, owner: str, job_id: str) -> Job:
        """Return a job of this owner. Raises NotFound."""
        return self.repository.get(job_id, owner)

    def list_page(
        self, owner: str, *, after: str | None, limit: int, ascending: bool = False, metadata: Mapping[str, str] = {}
    ) -> tuple[list[Job], bool]:
        """Return up to `limit` jobs by age, from the one after job `after`, and whether there are more.

        The newest comes first unless `ascending`. metadata: entries that the jobs must have. Raises NotFound.
        """
        last = None if after is None else self.get(owner, after)
        with self._store.database.reading() as session:
            query = select(Job).where(Job.owner == owner, *has_metadata(session, Job.job_metadata, metadata))
            place = None if last is None else (last.created_at, last.id)
            return read_page(session, query, (Job.created_at, Job.id), after=place, limit=limit, ascending=ascending)

    def cancel(self, owner: str, job_id: str) -> Job:
        """End a job at once; its worker stops before the next optimizer step. Raises NotFound, or Conflict if ended."""
        with self._locked_job(owner, job_id) as (session, job):
            _require_not_ended(job, "cancelled")
            finish(session, job, "cancelled", "The job was cancelled")
        return job

    def pause(self, owner: str, job_id: str) -> Job:
        """Pause a job, a running one after its step, with a checkpoint. Raises NotFound, or Conflict if it ended."""
        with self._locked_job(owner, job_id) as (session, job):
            _require_not_ended(job, "paused")
            if is_held(job, self._store.database.now(session)):
                job.pause_requested = True
            elif job.status != "paused":
                pause_job(session, job, "The job was paused")
        return job

    def resume(self, owner: str, job_id: str) -> Job:
        """Queue a paused job again, or withdraw a pause not yet begun. Raises NotFound, or Conflict if it ended."""
        with self._locked_job(owner, job_id) as (session, job):
            _require_not_ended(job, "resumed")
            job.pause_requested = False
            if job.status == "paused":
                queue(session, job, "The job was resumed")
        return job

    def retry(self, owner: str, job_id: str) -> Job:
        """Queue a failed or cancelled job from its newest checkpoint. Raises NotFound, or Conflict for other jobs."""
        with self._locked_job(owner, job_id) as (session, job):
            if job.status not in ("failed", "cancelled"):
                raise Conflict(
                    f"job {job_id} is {job.status}; only a failed or cancelled job can be retried",
                    code="job_not_failed",
                )
            job.error = None
            job.finished_at = None
            queue(session, job, "The job was queued for a retry")
        return job

    def events(self, owner: str, job_id: str, *, after: str | None, limit: int) -> tuple[list[JobEvent], bool]:
        """Return up to `limit` events, newest first, older than event `after`, and whether there are more."""
        self.get(owner, job_id)
        before = None if after is None else event_number(after, job_id)
        events = self.repository.events(job_id, before=before, limit=limit + 1)
        return events[:limit], len(events) > limit

    def follow(self, owner: str, job_id: str, *, after: str | None) -> AsyncGenerator[JobEvent]:
        """Stream the events after `after` until the job ends. Raises NotFound or InvalidRequest before it begins."""
        self.get(owner, job_id)
        number = 0 if after is None else event_number(after, job_id)
        if number and not self._feed.has(job_id, number):
            raise InvalidRequest(f"job {job_id} has no event {after!r} yet", param="after")
        return self._feed.follow(job_id, number)

    def end_streams(self) -> None:
        """End all streams of events with Unavailable, because the server stops."""
        self._feed.close()

    def checkpoints(self, owner: str, job_id: str) -> list[JobCheckpoint]:
        """Return the job's checkpoints, newest first."""
        self.get(owner, job_id)
        return self.repository.checkpoints(job_id)

    @contextmanager
    def _locked_job(self, owner: str, job_id: str) -> Iterator[tuple[Session, Job]]:
        self.get(owner, job_id)
        with self._store.database.session(may_use_reserve=True) as session:
            yield session, session.get_one(Job, job_id, with_for_update=True)

    def _check(self, owner: str, request: FineTuningJobCreate) -> tuple[dict[str, Path], Method | None]:
        """Check all but the content of the files; return these by the data set's name, and the method."""
        if request.model != self._base.name:
            raise NotFound(
                f"model {request.model!r} cannot be trained; the base is {self._base.name!r}",
                param="model",
                code="model_not_found",
            )
        files = {TRAINING: self._data_file(owner, request.training_file, "training_file")}
        if request.validation_file is not None:
            files[VALIDATION] = self._data_file(owner, request.validation_file, "validation_file")
        if request.suffix:
            check_name(request.suffix, "suffix")
            check_free(request.suffix, self._base.name, "suffix")
        method = requested_method(request)
        require_plan(self._base, method, seed=_seed(request))
        return files, method

    def _data_file(self, owner: str, file_id: str, param: str) -> Path:
        file = self._store.files.get(owner, file_id, param=param)
        if file.purpose != FINE_TUNE:
            raise InvalidRequest(
                f"{param} {file_id} has purpose {file.purpose!r}; expected {FINE_TUNE!r}",
                param=param,
                code="invalid_file",
            )
        return self._store.files.path(file, param=param)


def _require_not_ended(job: Job, wanted: str) -> None:
    if job.status in Job.ENDED:
        raise Conflict(f"job {job.id} has ended ({job.status}) and cannot be {wanted}", code="job_ended")


def _seed(request: FineTuningJobCreate) -> int:
    return request.seed if request.seed is not None else 0


def event_id(event: JobEvent) -> str:
    """Return the id that the API gives an event."""
    return f"{_event_prefix(event.job_id)}{event.number}"


def event_number(identity: str, job_id: str) -> int:
    """Return the number in an event's id. Raises InvalidRequest if the id is not of this job."""
    number = identity.removeprefix(_event_prefix(job_id))
    if number == identity or not number.isdecimal() or len(number) > MAX_DIGITS:
        raise InvalidRequest(f"{identity!r} is not the id of an event of job {job_id}", param="after")
    return int(number)


def _event_prefix(job_id: str) -> str:
    return f"ftevent-{job_id.removeprefix('ftjob-')}-"
