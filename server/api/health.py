"""/health, /ready and /metrics."""

from __future__ import annotations

import time

from fastapi import APIRouter, Response

from reftserve.client.schemas import Readiness
from reftserve.server.api.dependencies import Server
from reftserve.server.services import Services
from reftserve.server.training.worker import HEARTBEAT_FILE, HEARTBEAT_S

router = APIRouter(tags=["health"])
HEARTBEATS_MISSED = 10


@router.get("/health")
def health() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": Readiness}})
def ready(server: Server, response: Response) -> Readiness:
    """Model loaded, worker and database there; 503 while something is missing."""
    found = _readiness(server)
    response.status_code = 200 if found.ready else 503
    return found


@router.get("/metrics", response_class=Response)
def metrics(server: Server) -> Response:
    """Prometheus' text format."""
    server.metrics.ready.set(_readiness(server).ready)
    return Response(server.metrics.render(), media_type="text/plain; version=0.0.4")


def _readiness(server: Services) -> Readiness:
    heartbeat = server.settings.data / HEARTBEAT_FILE
    alive = heartbeat.exists() and time.time() - heartbeat.stat().st_mtime < HEARTBEATS_MISSED * HEARTBEAT_S
    model, database = server.engine.is_alive, server.database.is_reachable()
    return Readiness(ready=model and alive and database, model=model, worker=alive, database=database)
