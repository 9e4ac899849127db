"""The Python client and command line of ReftServe; needs no torch."""

from reftserve.client.async_client import AsyncClient
from reftserve.client.client import Client
from reftserve.client.exceptions import (
    BadRequest,
    Conflict,
    ConnectionFailed,
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
    "AsyncTextStream",
    "BadRequest",
    "Client",
    "Conflict",
    "ConnectionFailed",
    "Job",
    "JobEnded",
    "NotFound",
    "Overloaded",
    "ReftServeError",
    "ResponseError",
    "ServerFault",
    "StreamFailed",
    "TextStream",
    "Unavailable",
]
