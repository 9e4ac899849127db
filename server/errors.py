"""The errors that the server answers with, as one tree; only `api.error_responses` uses the status codes.

ServerError                      (500 unless a subclass says otherwise)
├── EngineFailed          500    the engine failed while it computed the request; not to be repeated
├── InvalidRequest        400    the request is malformed or out of range
├── NotFound              404    unknown model, intervention, file or job
├── Conflict              409    the resource's state forbids the request (in use, already cancelled, ...)
├── PayloadTooLarge       413    upload above the limit
├── ClientLeft            499    the client closed the connection; nobody reads this answer
├── QuotaExceeded         413    the disk quota of the owner, or of all jobs, is used up
├── Overloaded            429    the queue is full, or the wait too long; retry after `retry_after_s`
├── Unavailable           503    engine, worker or database is unavailable
├── DeadlineExceeded      504    the request's timeout has passed
└── StorageFull           507    the disk is full; nothing was written
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ServerError(Exception):
    """Base of all errors. param: the request field at fault, or None. code: a stable, machine-readable word."""

    status = 500
    type = "server_error"
    code = "internal_error"
    is_retriable = True  # False tells OpenAI's clients not to repeat the request

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.retry_after_s = retry_after_s


class EngineFailed(ServerError):
    """The engine failed while it computed the request, which may be the cause, so it must not be repeated."""

    code = "engine_failed"
    is_retriable = False


class InvalidRequest(ServerError):
    """The request is malformed or out of range."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class NotFound(ServerError):
    """Unknown model, intervention, file or job; the message suggests similar names."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(ServerError):
    """The resource's state forbids the request."""

    status, type, code = 409, "invalid_request_error", "conflict"


class PayloadTooLarge(ServerError):
    """An upload above the configured limit."""

    status, type, code = 413, "invalid_request_error", "payload_too_large"


class ClientLeft(ServerError):
    """The client closed the connection; nobody reads the answer. 499 is nginx's number for it."""

    status, type, code = 499, "invalid_request_error", "client_left"


class QuotaExceeded(ServerError):
    """A configured disk quota is used up. 413 and not 507: a retry cannot succeed."""

    status, type, code = 413, "invalid_request_error", "storage_quota_exceeded"


class Overloaded(ServerError):
    """The queue is full, or the first token would come too late."""

    status, type, code = 429, "rate_limit_error", "overloaded"


class Unavailable(ServerError):
    """A part of the server is unavailable."""

    status, type, code = 503, "server_error", "unavailable"


class DeadlineExceeded(ServerError):
    """The request's timeout has passed."""

    status, type, code = 504, "server_error", "deadline_exceeded"


class StorageFull(ServerError):
    """The disk is full; the partial write has been removed."""

    status, type, code = 507, "server_error", "storage_full"


def field_path(location: Sequence[str | int], value: Any) -> str:
    """Return the dotted path in `value` of a pydantic error's `loc`, which also holds union members (`list[int]`)."""
    path: list[str] = []
    for index, part in enumerate(location):
        if isinstance(value, Mapping):
            # A missing field is not in the value; it can only come last.
            if part not in value and index < len(location) - 1:
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(str(part))
    return ".".join(path)
