"""/health, /ready and /metrics."""

from __future__ import annotations

import time
from pathlib import Path

from fastapi import APIRouter, Response

from reftserve.client.schemas import Readiness
from reftserve.server.api.dependencies import Database, Inference, Metrics, Settings
from reftserve.server.settings import HEARTBEAT_S

router = APIRouter(tags=["health"])
HEARTBEATS_MISSED = 10


@router.get("/health")
def health() -> dict[str, str]:
    """Answer that the process is there."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": Readiness}})
def ready(inference: Inference, database: Database, settings: Settings, response: Response) -> Readiness:
    """Say whether model, worker and database are there; 503 while one is missing."""
    found = _readiness(inference, database, settings)
    response.status_code = 200 if found.ready else 503
    return found


@router.get("/metrics", response_class=Response)
def metrics(metrics: Metrics, inference: Inference, database: Database, settings: Settings) -> Response:
    """Prometheus' text format."""
    metrics.ready.set(_readiness(inference, database, settings).ready)
    return Response(metrics.render(), media_type="text/plain; version=0.0.4")


def _readiness(inference: Inference, database: Database, settings: Settings) -> Readiness:
    worker, is_reachable = _beats(settings.heartbeat_file), database.is_reachable()
    model = inference.is_ready
    return Readiness(ready=model and worker and is_reachable, model=model, worker=worker, database=is_reachable)


def _beats(heartbeat: Path) -> bool:
    try:
        return time.time() - heartbeat.stat().st_mtime < HEARTBEATS_MISSED * HEARTBEAT_S
    except FileNotFoundError:
        return False
