"""The Python client and command line of ReftServe, without torch.

    with Client() as client:
        job = client.train("reviews.jsonl", name="sentiment").wait(progress=True)
        print(client.chat("Is this good? ...", model=job.fine_tuned_model).text)
        with client.stream("Once upon a time") as pieces:
            for piece in pieces:
                print(piece, end="")

AsyncClient has the same methods to await, and `await client.base_model()` for the property `client.base_model`. Its
streams open by `async with await client.stream(...)`. Threads may share a Client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reftserve.client._async.client import AsyncClient
    from reftserve.client._async.evals import AsyncRun
    from reftserve.client._async.jobs import AsyncJob
    from reftserve.client._async.streams import AsyncTextStream
    from reftserve.client._sync.client import Client
    from reftserve.client._sync.evals import Run
    from reftserve.client._sync.jobs import Job
    from reftserve.client._sync.streams import TextStream
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

_MODULES = {
    "_async.client": ("AsyncClient",),
    "_async.evals": ("AsyncRun",),
    "_async.jobs": ("AsyncJob",),
    "_async.streams": ("AsyncTextStream",),
    "_sync.client": ("Client",),
    "_sync.evals": ("Run",),
    "_sync.jobs": ("Job",),
    "_sync.streams": ("TextStream",),
    "exceptions": (
        "BadRequest",
        "Conflict",
        "ConnectionFailed",
        "EvalRunEnded",
        "JobEnded",
        "NotFound",
        "Overloaded",
        "ReftServeError",
        "ResponseError",
        "ServerFault",
        "StreamFailed",
        "Unavailable",
    ),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

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

if not TYPE_CHECKING:  # a type checker would accept any name of a module with __getattr__

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
