"""/v1/fine_tuning/validate: what a job would learn from, without the job."""

from __future__ import annotations

from fastapi import APIRouter

from reftserve.client.schemas import DataReport, FineTuningJobCreate
from reftserve.server.api.dependencies import Owner, Server

router = APIRouter(prefix="/v1/fine_tuning/validate", tags=["fine-tuning"])


@router.post("")
def validate(request: FineTuningJobCreate, server: Server, owner: Owner) -> DataReport:
    """Check what creating this job would check, and report on its data; nothing is queued."""
    return server.jobs.validate(owner, request)
