"""Error answers: the only code that turns exceptions into OpenAI's error object."""

from __future__ import annotations

import logging
import math

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reftserve.client.schemas import ErrorBody, ErrorDetail
from reftserve.client.schemas.unicode import whole_text
from reftserve.server.errors import ServerError, field_path

logger = logging.getLogger(__name__)


def error_body(error: ServerError) -> ErrorBody:
    """Return OpenAI's error object."""
    return _body(error.message, error.type, error.param, error.code)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _server_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)  # noqa: S101 - registered for it alone
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if not error.is_retriable:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error).model_dump(), error.status, headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
    found = error.errors()
    # A union reports errors of each member; an unknown field is the most specific one.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    source, *location = first["loc"]
    path = field_path(location, error.body) if source == "body" else ".".join(map(str, location))
    param = path or None
    if first["type"] == "json_invalid":
        message, code = f"the body is not JSON: {first['ctx']['error']} at byte {location[-1]}", "invalid_json"
        param = None
    elif first["type"] == "string_unicode" and not location:
        message, code = "a field's name holds half a surrogate pair, which is no character", "invalid_value"
    elif source == "body" and not location:
        message, code = "the body must be a JSON object, sent with Content-Type: application/json", "invalid_json"
    elif first["type"] == "extra_forbidden":
        message, code = f"unknown field {param!r}", "unknown_field"
    elif first["type"] == "missing":
        message, code = f"field {param!r} is missing", "missing_field"
    else:
        message, code = f"field {param!r}: {first['msg']}", "invalid_value"
    return _answer(400, message, "invalid_request_error", param, code)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    codes = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}
    message = f"{request.method} {request.url.path}: {error.detail}"
    code = codes.get(error.status_code, "http_error")
    return _answer(error.status_code, message, "invalid_request_error", None, code)


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _answer(500, "internal error; see the server's log", "server_error", None, "internal_error")


def _answer(status: int, message: str, kind: str, param: str | None, code: str) -> JSONResponse:
    return JSONResponse(_body(message, kind, param, code).model_dump(), status)


def _body(message: str, kind: str, param: str | None, code: str) -> ErrorBody:
    """Return OpenAI's error object; text quoted from the request may hold half a surrogate pair."""
    param = None if param is None else whole_text(param)
    return ErrorBody(error=ErrorDetail(message=whole_text(message), type=kind, param=param, code=code))
