"""/v1/fine_tuning/jobs in OpenAI's shape, and /v1/fine_tuning/validate: the checks of a job without the job."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Query, Response

from reftserve.client.schemas import (
    DataReport,
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    FineTuningJobCreate,
    Page,
)
from reftserve.server.api.body_route import BodyRoute
from reftserve.server.api.dependencies import Jobs, Owner
from reftserve.server.api.envelope import page
from reftserve.server.api.metadata_filter import WantedMetadata
from reftserve.server.api.openapi import EVENTS
from reftserve.server.api.own_threads import OwnThreads
from reftserve.server.api.sse import event_stream
from reftserve.server.errors import InvalidRequest
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent
from reftserve.server.training.job_service import event_id

router = APIRouter(prefix="/v1/fine_tuning", tags=["fine-tuning"], route_class=BodyRoute)
_checks = OwnThreads("checks of data", threads=4)


@router.post("/validate")
async def validate(request: FineTuningJobCreate, jobs: Jobs, owner: Owner) -> DataReport:
    """Run a job's checks and report on its data; queue nothing."""
    return await _checks.run(lambda: jobs.validate(owner, request))


@router.post("/jobs")
def create_job(request: FineTuningJobCreate, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Queue a training run, which checks its files first and publishes an intervention named `suffix`."""
    return _job(jobs.create(owner, request))


@router.get("/jobs")
def list_jobs(
    jobs: Jobs,
    owner: Owner,
    metadata: WantedMetadata,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=1000),
    order: Literal["asc", "desc"] = "desc",
) -> Page[FineTuningJob]:
    """List jobs, newest first unless `order` is `asc`. `metadata[key]=value` lists those with that metadata."""
    rows, more = jobs.list_page(owner, after=after, limit=limit, ascending=order == "asc", metadata=metadata)
    return page([_job(row) for row in rows], [row.id for row in rows], has_more=more)


@router.get("/jobs/{job_id}")
def get_job(job_id: str, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Return a job."""
    return _job(jobs.get(owner, job_id))


@router.post("/jobs/{job_id}/cancel")
def cancel_job(job_id: str, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Cancel a job at once; it can be retried."""
    return _job(jobs.cancel(owner, job_id))


@router.post("/jobs/{job_id}/pause")
def pause_job(job_id: str, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Pause a job after its current optimizer step."""
    return _job(jobs.pause(owner, job_id))


@router.post("/jobs/{job_id}/resume")
def resume_job(job_id: str, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Resume a paused job from the step where it paused."""
    return _job(jobs.resume(owner, job_id))


@router.post("/jobs/{job_id}/retry")
def retry_job(job_id: str, jobs: Jobs, owner: Owner) -> FineTuningJob:
    """Retry a failed or cancelled job, from its last checkpoint if that is still stored."""
    return _job(jobs.retry(owner, job_id))


@router.get("/jobs/{job_id}/events", response_model=Page[FineTuningEvent], responses=EVENTS)
def list_events(
    job_id: str,
    jobs: Jobs,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=1000),
    stream: bool | None = None,
    accept: Annotated[str | None, Header()] = None,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Page[FineTuningEvent] | Response:
    """List events, newest first; `after` continues with older ones.

    `stream=true` or `Accept: text/event-stream` sends them as server-sent events, oldest first, and follows the job
    until it ends. `Last-Event-ID`, or `after`, is then the last event that the client has seen.
    """
    if stream if stream is not None else "text/event-stream" in (accept or ""):
        events = jobs.follow(owner, job_id, after=last_event_id or after)
        return event_stream(_streamed(events), id_of=lambda event: event.id)
    rows, more = jobs.events(owner, job_id, after=after, limit=limit)
    return page([_event(row) for row in rows], [event_id(row) for row in rows], has_more=more)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(
    job_id: str,
    jobs: Jobs,
    owner: Owner,
    after: str | None = None,
    limit: int | None = Query(None, ge=1, le=1000),
) -> Page[FineTuningCheckpoint]:
    """List checkpoints, newest first: all, or up to `limit`; `after` continues with older ones."""
    found = [_checkpoint(row) for row in jobs.checkpoints(owner, job_id)]
    ids = [checkpoint.id for checkpoint in found]
    if after is not None and after not in ids:
        raise InvalidRequest(f"{after!r} is not the id of a checkpoint of job {job_id}", param="after")
    first = 0 if after is None else ids.index(after) + 1
    end = len(found) if limit is None else first + limit
    return page(found[first:end], ids[first:end], has_more=end < len(found))


def _job(job: Job) -> FineTuningJob:
    hyperparameters = {name: job.plan.get(name, "auto") for name in ("n_epochs", "batch_size", "learning_rate")}
    return FineTuningJob(
        id=job.id,
        created_at=job.created_at,
        finished_at=job.finished_at,
        model=job.model,
        fine_tuned_model=job.fine_tuned_model,
        organization_id=job.owner,
        result_files=job.result_files,
        status=job.status,
        trained_tokens=job.trained_tokens,
        training_file=job.training_file,
        validation_file=job.validation_file,
        suffix=job.suffix,
        hyperparameters=hyperparameters,
        method=job.method,
        plan=job.plan,
        data_report=job.data_report,
        error=job.error,
        seed=job.seed,
        estimated_finish=job.estimated_finish,
        metadata=job.job_metadata,
    )


async def _streamed(events: AsyncGenerator[JobEvent]) -> AsyncGenerator[FineTuningEvent]:
    async with aclosing(events):
        async for event in events:
            yield _event(event)


def _event(event: JobEvent) -> FineTuningEvent:
    return FineTuningEvent(
        id=event_id(event),
        created_at=event.created_at,
        level=event.level,
        message=event.message,
        type=event.type,
        data=event.data,
    )


def _checkpoint(row: JobCheckpoint) -> FineTuningCheckpoint:
    return FineTuningCheckpoint(
        id=f"ftckpt-{row.job_id.removeprefix('ftjob-')}-{row.step}",
        created_at=row.created_at,
        fine_tuning_job_id=row.job_id,
        fine_tuned_model_checkpoint=f"checkpoint-{row.step}",
        step_number=row.step,
        metrics=row.metrics,
    )
