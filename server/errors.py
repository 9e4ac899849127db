"""Every error the server can answer with, as one tree.

    ServerError                      (500 unless a subclass says otherwise)
    ├── InvalidRequest        400    what was sent cannot be understood or is out of range
    ├── NotFound              404    no such model, intervention, file or job
    ├── Conflict              409    the state of the thing forbids it (in use, already cancelled, ...)
    ├── PayloadTooLarge       413    upload above the limit
    ├── QuotaExceeded         413    the owner's, or the jobs', share of the disk is used up
    ├── Overloaded            429    the queue is full; try again after `retry_after_s`
    ├── Unavailable           503    engine, worker or database are not there right now
    ├── DeadlineExceeded      504    not done within the time that the request gave
    └── StorageFull           507    the disk is full; nothing was written

Errors are raised where the cause is known, with the offending value and what would be right. `app.py`
turns them into OpenAI's shape; nothing else knows status codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class ServerError(Exception):
    """An error with everything that the wire's error object needs.

    param: the request field at fault, or None. code: a stable, machine-readable word.
    """

    status = 500
    type = "server_error"
    code = "internal_error"

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


class InvalidRequest(ServerError):
    """What was sent cannot be understood or is out of range."""

    status, type, code = 400, "invalid_request_error", "invalid_request"


class NotFound(ServerError):
    """No such model, intervention, file or job; the message offers near names."""

    status, type, code = 404, "invalid_request_error", "not_found"


class Conflict(ServerError):
    """The state of the thing forbids what was asked."""

    status, type, code = 409, "invalid_request_error", "conflict"


class PayloadTooLarge(ServerError):
    """An upload above the configured limit."""

    status, type, code = 413, "invalid_request_error", "payload_too_large"


class QuotaExceeded(ServerError):
    """A configured share of the disk is used up; 413 and not 507, because another attempt cannot mend it."""

    status, type, code = 413, "invalid_request_error", "storage_quota_exceeded"


class Overloaded(ServerError):
    """The queue is full."""

    status, type, code = 429, "rate_limit_error", "overloaded"


class Unavailable(ServerError):
    """A part of the server is not there right now."""

    status, type, code = 503, "server_error", "unavailable"


class DeadlineExceeded(ServerError):
    """Not done within the time that the request gave."""

    status, type, code = 504, "server_error", "deadline_exceeded"


class StorageFull(ServerError):
    """The disk is full; what was being written has been removed again."""

    status, type, code = 507, "server_error", "storage_full"


def field_path(location: Sequence[str | int], value: Any) -> str:
    """The dotted path within `value` that an error's `loc` means.

    pydantic also puts the tried members of unions (`str`, `list[int]`, ...) into `loc`; they are no part of the path.
    """
    path: list[str] = []
    for index, part in enumerate(location):
        if isinstance(value, Mapping):
            # A field that is missing is not in the value; it can only come last.
            if part not in value and index < len(location) - 1:
                continue
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        else:
            continue
        path.append(str(part))
    return ".".join(path)
