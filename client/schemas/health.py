"""/ready."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class Readiness(Response):
    """GET /ready."""

    ready: bool
    model: bool
    worker: bool
    database: bool
