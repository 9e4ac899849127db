"""What /openapi.json says beside the routes: errors in OpenAI's shape, and event streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI

from reftserve.client.schemas import ErrorBody

_MEANINGS: dict[int | str, str] = {
    400: "The request is wrong; `param` names the field",
    403: "The request comes from a web page of an origin that the server does not allow",
    404: "There is no such model, intervention, file, job or eval",
    408: "The body has not arrived in time",
    409: "The state of the resource forbids it",
    413: "The body, the file, or what its owner stores is above a limit",
    415: "The body has a Content-Encoding that the server does not read",
    421: "The server does not answer to the request's Host",
    429: "The queue is full; `Retry-After` says when to come back",
    500: "An error of the server; its log has the cause",
    503: "A part of the server is not there; `Retry-After` says when to come back",
    504: "The request's own timeout has passed",
    507: "The disk is full; nothing was stored",
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": meaning} for status, meaning in _MEANINGS.items()
}
# For `responses=` of a route that may answer with server-sent events.
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
}


def describe_truly(app: FastAPI) -> None:
    """Leave out of the description what FastAPI adds: status 422, which the server never sends."""
    describe: Callable[[], dict[str, Any]] = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = describe()
            for operations in found["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for schema in ("HTTPValidationError", "ValidationError"):
                found["components"]["schemas"].pop(schema, None)
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]
