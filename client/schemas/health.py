"""/ready: the server's readiness; / and /v1: where things are."""

from __future__ import annotations

from reftserve.client.schemas.base import Response


class Readiness(Response):
    """Response of GET /ready. ready: model and database are there. worker: one works on this server's data folder."""

    ready: bool
    model: bool
    worker: bool
    database: bool


class Index(Response):
    """Response of GET / and GET /v1: which server this is, and the paths of its API and documentation."""

    name: str
    version: str
    model: str
    api: str
    documentation: str
    openapi: str
