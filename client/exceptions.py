"""The exceptions of the client, as one tree.

ReftServeError
├── AddressError                 the server's address, or a proxy of the environment, cannot be used
├── ConnectionFailed             no answer: refused, reset, timed out
├── UnexpectedAnswer             an answer that is not a ReftServe server's
├── ResponseError                the server answered with an error object
│   ├── BadRequest       4xx     the request is wrong; `param` names the field
│   ├── NotFound         404     no such model, intervention, file or job
│   ├── Conflict         409     the state of the resource forbids it
│   ├── Overloaded       429     the queue is full, after all retries
│   ├── Unavailable      503     a part of the server is down, after all retries
│   └── ServerFault      5xx     the server failed; its log has the cause
├── StreamFailed                 the server ended a stream with an error
├── JobEnded                     the awaited job failed or was cancelled
└── EvalRunEnded                 the awaited run failed or was canceled
"""

from __future__ import annotations

import httpx
from pydantic import ValidationError

from reftserve.client.schemas import ErrorBody, ErrorDetail, EvalRun, FineTuningJob


class ReftServeError(Exception):
    """Base of all exceptions of the client."""


class AddressError(ReftServeError, ValueError):
    """A server's address, or a proxy that the environment names, cannot be used."""


class UnexpectedAnswer(ReftServeError):
    """The answer is not a ReftServe server's."""


class ConnectionFailed(ReftServeError):
    """No answer came from the server."""


class ResponseError(ReftServeError):
    """An answer with status 400 or above, OpenAI's error fields, the asked URL, and Retry-After in seconds."""

    def __init__(
        self, status: int, detail: ErrorDetail, retry_after_s: float | None = None, url: str | None = None
    ) -> None:
        super().__init__(detail.message)
        self.url = url
        self.status = status
        self.message = detail.message
        self.type = detail.type
        self.param = detail.param
        self.code = detail.code
        self.retry_after_s = retry_after_s


class BadRequest(ResponseError):
    """The request is wrong."""


class NotFound(ResponseError):
    """The named resource does not exist; the message offers similar names."""


class Conflict(ResponseError):
    """The state of the resource forbids the request."""


class Overloaded(ResponseError):
    """The server's queue was full at every attempt."""


class Unavailable(ResponseError):
    """A part of the server was down at every attempt."""


class ServerFault(ResponseError):
    """The server failed; its log has the cause."""


class StreamFailed(ReftServeError):
    """A stream ended with an error. The pieces before it are valid."""

    def __init__(self, detail: ErrorDetail) -> None:
        super().__init__(detail.message)
        self.message = detail.message
        self.code = detail.code


class JobEnded(ReftServeError):
    """A job ended without an intervention. `job` is its last state; of a failure `code` and `param` (the field)."""

    def __init__(self, job: FineTuningJob) -> None:
        reason = job.error.message if job.error is not None else f"job {job.id} {_ended(job.status)}"
        super().__init__(reason)
        self.message = reason
        self.code = None if job.error is None else job.error.code
        self.param = None if job.error is None else job.error.param
        self.job = job


class EvalRunEnded(ReftServeError):
    """A run of an eval ended before it was complete. `run` is its last state."""

    def __init__(self, run: EvalRun) -> None:
        super().__init__(run.error.message if run.error is not None else f"run {run.id} {_ended(run.status)}")
        self.run = run


def _ended(status: str) -> str:
    return "has failed" if status == "failed" else f"was {status}" if status.startswith("cancel") else f"is {status}"


_BY_STATUS: dict[int, type[ResponseError]] = {404: NotFound, 409: Conflict, 429: Overloaded, 503: Unavailable}


def response_error(response: httpx.Response) -> ResponseError:
    """Return the exception for an answer whose body has been read."""
    try:
        detail = ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        # The page of a proxy or of another server.
        detail = ErrorDetail(message=f"HTTP {response.status_code}: {response.text[:200]}", type="http_error")
    status = response.status_code
    kind = _BY_STATUS.get(status) or (ServerFault if status >= 500 else BadRequest)
    return kind(status, detail, _retry_after_s(response.headers.get("Retry-After")), str(response.request.url))


def _retry_after_s(header: str | None) -> float | None:
    return float(header) if header is not None and header.isdecimal() else None
