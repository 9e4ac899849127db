"""Server-sent events in OpenAI's form, and answers that stop when the client disconnects."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel
from sse_starlette import EventSourceResponse, ServerSentEvent

from reftserve.server.api.error_responses import as_server_error, error_body
from reftserve.server.errors import ClientLeft

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
CLIENT_POLL_S = 0.2
KEEP_ALIVE_S = 15


def event_stream(chunks: AsyncGenerator[M], *, id_of: Callable[[M], str] | None = None) -> EventSourceResponse:
    """Stream chunks as server-sent events, then an error if one comes, then `[DONE]`. id_of: for `Last-Event-ID`."""

    async def lines() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(chunks) as source:
            try:
                async for chunk in source:
                    yield _event(chunk) if id_of is None else f"id: {id_of(chunk)}\n".encode() + _event(chunk)
            except Exception as cause:
                yield _event(error_body(as_server_error(cause)))
        yield b"data: [DONE]\n\n"

    return EventSourceResponse(lines(), ping=KEEP_ALIVE_S, ping_message_factory=_KeepAlive, sep="\n")


class _KeepAlive(ServerSentEvent):
    """A comment alone. The blank line of sse_starlette's makes OpenAI's decoder yield an event if one had an id."""

    def encode(self) -> bytes:
        return b": keep-alive\n"


def _event(message: BaseModel) -> bytes:
    # JSON has no line breaks; sse_starlette would search every token for them.
    return b"data: " + message.model_dump_json().encode() + b"\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or cancel it and raise ClientLeft as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=CLIENT_POLL_S)
            if not task.done() and await request.is_disconnected():
                raise ClientLeft("the client closed the connection before its answer was there")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
