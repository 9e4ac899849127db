"""/ready: the server's readiness."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class Readiness(Response):
    """Response of GET /ready. ready: model, worker and database are all ready."""

    ready: bool
    model: bool
    worker: bool
    database: bool
