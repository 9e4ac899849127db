"""/ready: the server's readiness."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class Readiness(Response):
    """Response of GET /ready. ready: model and database are there. worker: one works on this server's data folder."""

    ready: bool
    model: bool
    worker: bool
    database: bool
