"""The Python client and command line of ReftServe, without torch.

    with Client() as client:
        job = client.train("reviews.jsonl", name="sentiment").wait(progress=True)
        print(client.chat("Is this good? ...", model=job.fine_tuned_model).text)
        with client.stream("Once upon a time") as pieces:
            for piece in pieces:
                print(piece, end="")

    async with AsyncClient() as client:
        job = await client.train("reviews.jsonl", name="sentiment")
        await job.wait(progress=True)
        answer = await client.chat("Is this good? ...", model=job.fine_tuned_model)
        async with await client.stream("Once upon a time") as pieces:
            async for piece in pieces:
                print(piece, end="")

Threads may share a Client. Its base model's id is `client.base_model`; AsyncClient has `await client.base_model()`.
"""

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
