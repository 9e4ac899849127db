"""Error answers: the only code that turns exceptions into OpenAI's error object."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from reftserve.client.schemas import ErrorBody, ErrorDetail
from reftserve.client.schemas.unicode import whole_text
from reftserve.server.api.request_line import sent_method
from reftserve.server.errors import ClientLeft, ServerError, Unavailable, field_path
from reftserve.server.storage.database import is_unavailable
from reftserve.server.storage.reserve import NO_ROOM, temporary_folder_full

logger = logging.getLogger(__name__)
DATABASE_RETRY_AFTER_S = 5.0

HTTP_CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "payload_too_large",
    415: "unsupported_content_encoding",
}
METHODS = ("DELETE", "GET", "POST", "PUT")
MAX_QUOTED = 200  # characters of the request in an error, so that nobody can make it carry a text of theirs
MAX_MESSAGE = 2000
QUOTED = re.compile(r"'[^']{200,}'|\"[^\"]{200,}\"")


def error_body(error: ServerError) -> ErrorBody:
    """Return OpenAI's error object."""
    return _body(error.message, error.type, error.param, error.code)


def error_answer(
    status: int, message: str, kind: str, param: str | None, code: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return an answer with OpenAI's error object."""
    return JSONResponse(_body(message, kind, param, code).model_dump(), status, headers)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every exception in OpenAI's shape."""
    app.add_exception_handler(ServerError, _server_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(SQLAlchemyError, _unexpected_error)
    app.add_exception_handler(Exception, _unexpected_error)


async def _server_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServerError)  # noqa: S101 - registered for it alone
    if isinstance(error, ClientLeft):
        logger.info("%s %s: %s", sent_method(request.scope), request.url.path, error.message)
    headers = {} if error.retry_after_s is None else {"Retry-After": str(math.ceil(error.retry_after_s))}
    if not error.is_retriable:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error).model_dump(), error.status, headers)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - registered for it alone
    first = _most_specific(error)
    source, *location = first["loc"]
    path = _path(first, error.body)
    param = path or None
    if first["type"] == "string_unicode" and not location:
        message, code = "a field's name holds half a surrogate pair, which is no character", "invalid_value"
    elif source == "body" and not location:
        message, code = "the body must be a JSON object, sent with Content-Type: application/json", "invalid_json"
    elif first["type"] == "extra_forbidden":
        message, code = f"unknown field {param!r}", "unknown_field"
    elif first["type"] == "missing":
        message, code = f"field {param!r} is missing", "missing_field"
    else:
        message, code = f"field {param!r}: {_reason(first)}", "invalid_value"
    return error_answer(400, message, "invalid_request_error", param, code)


def _most_specific(error: RequestValidationError) -> Mapping[str, Any]:
    """Return the error of the first wrong field. A union has one for each member.

    Of these a list that is too long tells most, then the deepest error.
    """
    found: list[Mapping[str, Any]] = list(error.errors())
    unknown = next((each for each in found if each["type"] == "extra_forbidden"), None)
    same_field = [each for each in found if each["loc"][:2] == found[0]["loc"][:2]]

    def rank(each: Mapping[str, Any]) -> tuple[bool, int, bool]:
        depth = _path(each, error.body).count(".")
        return each["type"] == "too_long", depth, not each["type"].endswith("_type")

    return unknown or max(same_field, key=rank)


def _path(error: Mapping[str, Any], body: Any) -> str:
    source, *location = error["loc"]
    return field_path(location, body) if source == "body" else ".".join(map(str, location))


def _reason(error: Mapping[str, Any]) -> str:
    limits = error.get("ctx", {})
    if error["type"] == "too_long":
        return f"at most {limits['max_length']} entries are allowed"
    if error["type"] == "string_unicode":
        return "half a surrogate pair is no character"
    if error["type"] == "too_short":
        return f"at least {limits['min_length']} entries are needed"
    return str(error["msg"])


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for it alone
    # FastAPI answers 400 for whatever stops the parser of a body, which keeps uploads in a temporary file.
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_ROOM:
        return await _server_error(request, temporary_folder_full("the upload"))
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_allowed_methods(request))
    message = f"{sent_method(request.scope)} {_cut(request.url.path, MAX_QUOTED)}: {error.detail}"
    code = HTTP_CODES.get(error.status_code, "http_error")
    return error_answer(error.status_code, message, "invalid_request_error", None, code, headers)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes with the request's path; the framework names those of the first one."""
    found = set()
    for method in METHODS:
        scope = {**request.scope, "method": method}
        if any(each.matches(scope)[0] is Match.FULL for each in request.app.router.routes):
            found.add(method)
    return sorted(found | ({"HEAD"} if "GET" in found else set()))


async def _unexpected_error(request: Request, error: Exception) -> JSONResponse:
    return await _server_error(request, as_server_error(error))


def as_server_error(error: Exception) -> ServerError:
    """Return any exception as one of the server's errors, and log it unless it is one."""
    if isinstance(error, ServerError):
        return error
    if isinstance(error, SQLAlchemyError) and is_unavailable(error):
        logger.error("the database is unavailable: %s", error)
        away = "the database is locked, away or damaged; the server's log has the reason"
        return Unavailable(away, code="database_unavailable", retry_after_s=DATABASE_RETRY_AFTER_S)
    logger.error("a request failed", exc_info=error)
    return ServerError("internal error; see the server's log")


def _body(message: str, kind: str, param: str | None, code: str) -> ErrorBody:
    """Return OpenAI's error object; text quoted from the request may be long or hold half a surrogate pair."""
    param = None if param is None else whole_text(_cut(param, MAX_QUOTED))
    message = QUOTED.sub(lambda quoted: _cut(quoted[0], MAX_QUOTED), message)
    message = whole_text(_cut(message, MAX_MESSAGE))
    return ErrorBody(error=ErrorDetail(message=message, type=kind, param=param, code=code))


def _cut(text: str, length: int) -> str:
    """Return the text, or its first half and its last quarter around an ellipsis."""
    return text if len(text) <= length else f"{text[: length // 2]}...{text[-(length // 4) :]}"
