"""The Python client and command line of ReftServe; needs no torch."""

from reftserve.client.async_client import AsyncClient
from reftserve.client.client import Client
from reftserve.client.evals import AsyncRun, Run
from reftserve.client.exceptions import (
    BadRequest,
    Conflict,
    ConnectionFailed,
    EvalRunEnded,
    JobEnded,
    NotFound,
    Overloaded,
    ReftServeError,
    ResponseError,
    ServerFault,
    StreamFailed,
    Unavailable,
)
from reftserve.client.jobs import AsyncJob, Job
from reftserve.client.streams import AsyncTextStream, TextStream

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncRun",
    "AsyncTextStream",
    "BadRequest",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "EvalRunEnded",
    "Job",
    "JobEnded",
    "NotFound",
    "Overloaded",
    "ReftServeError",
    "ResponseError",
    "Run",
    "ServerFault",
    "StreamFailed",
    "TextStream",
    "Unavailable",
]
