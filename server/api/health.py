"""/health, /ready and /metrics. No answer waits for a writer, a full thread pool or a database that is away."""

from __future__ import annotations

import time
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response

from reftserve.client.schemas import Readiness
from reftserve.server.api.dependencies import Database, Inference, Metrics, Settings
from reftserve.server.settings import HEARTBEAT_S

router = APIRouter(tags=["health"])
HEARTBEATS_MISSED = 10
CHECK_S = 2.0
# Probes have threads of their own, because writers that wait for a lock may hold all those of the other endpoints.
_threads = CapacityLimiter(4)


@router.get("/health")
async def health() -> dict[str, str]:
    """Answer that the process is there."""
    return {"status": "ok"}


@router.get("/ready", responses={503: {"model": Readiness}})
async def ready(inference: Inference, database: Database, settings: Settings, response: Response) -> Readiness:
    """Say whether requests can be served: 503 without model or database. `worker` only informs."""
    found = await _readiness(inference, database, settings)
    response.status_code = 200 if found.ready else 503
    return found


@router.get("/metrics", response_class=Response)
async def metrics(metrics: Metrics, inference: Inference, database: Database, settings: Settings) -> Response:
    """Prometheus' text format."""
    metrics.ready.set((await _readiness(inference, database, settings)).ready)
    return Response(metrics.render(), media_type="text/plain; version=0.0.4")


async def _readiness(inference: Inference, database: Database, settings: Settings) -> Readiness:
    worker = is_reachable = False
    with anyio.move_on_after(CHECK_S):
        worker = await to_thread.run_sync(_beats, settings.heartbeat_file, abandon_on_cancel=True, limiter=_threads)
        is_reachable = await to_thread.run_sync(database.is_reachable, abandon_on_cancel=True, limiter=_threads)
    model = inference.is_ready
    return Readiness(ready=model and is_reachable, model=model, worker=worker, database=is_reachable)


def _beats(heartbeat: Path) -> bool:
    try:
        return time.time() - heartbeat.stat().st_mtime < HEARTBEATS_MISSED * HEARTBEAT_S
    except OSError:  # no worker has run here, or the data folder's disk does not answer
        return False
