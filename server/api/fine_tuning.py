"""/v1/fine_tuning/jobs in OpenAI's shape."""

from __future__ import annotations

from fastapi import APIRouter, Query

from reftserve.client.schemas import (
    FineTuningCheckpoint,
    FineTuningEvent,
    FineTuningJob,
    FineTuningJobCreate,
    Page,
)
from reftserve.server.api.dependencies import Owner, Server
from reftserve.server.storage.tables import Job, JobCheckpoint, JobEvent
from reftserve.server.training.jobs import event_id

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])


@router.post("")
def create_job(request: FineTuningJobCreate, server: Server, owner: Owner) -> FineTuningJob:
    """Queue a training run; its result is an intervention named by `suffix`."""
    return _job(server.jobs.create(owner, request))


@router.get("")
def list_jobs(
    server: Server, owner: Owner, after: str | None = None, limit: int = Query(20, ge=1, le=1000)
) -> Page[FineTuningJob]:
    """Jobs, newest first."""
    jobs, more = server.jobs.list_page(owner, after=after, limit=limit)
    return Page(data=[_job(job) for job in jobs], has_more=more)


@router.get("/{job_id}")
def get_job(job_id: str, server: Server, owner: Owner) -> FineTuningJob:
    """One job."""
    return _job(server.jobs.get(owner, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, server: Server, owner: Owner) -> FineTuningJob:
    """Stop a job before its next optimizer step."""
    return _job(server.jobs.cancel(owner, job_id))


@router.get("/{job_id}/events")
def list_events(
    job_id: str,
    server: Server,
    owner: Owner,
    after: str | None = None,
    limit: int = Query(20, ge=1, le=1000),
) -> Page[FineTuningEvent]:
    """Events, newest first; `after` continues towards older ones."""
    events, more = server.jobs.events(owner, job_id, after=after, limit=limit)
    return Page(data=[_event(event) for event in events], has_more=more)


@router.get("/{job_id}/checkpoints")
def list_checkpoints(job_id: str, server: Server, owner: Owner) -> Page[FineTuningCheckpoint]:
    """Durable steps, newest first."""
    return Page(data=[_checkpoint(row) for row in server.jobs.checkpoints(owner, job_id)])


def _job(job: Job) -> FineTuningJob:
    hyperparameters = {name: job.plan[name] for name in ("n_epochs", "batch_size", "learning_rate")}
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
        data_report=job.data_report,
        error=job.error,
        seed=job.seed,
        estimated_finish=job.estimated_finish,
        metadata=job.job_metadata,
    )


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
        fine_tuned_model_checkpoint=row.path,
        step_number=row.step,
        metrics=row.metrics,
    )
