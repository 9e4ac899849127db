"""Answers that arrive piece by piece: server-sent events read into pieces of text.

    with client.stream("Once upon a time") as pieces:
        for piece in pieces:
            print(piece, end="")

Leaving the block ends the request on the server too.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import Annotated

import httpx
from httpx_sse import EventSource
from pydantic import Field, TypeAdapter

from reftserve.client.exceptions import ConnectionFailed, StreamFailed
from reftserve.client.schemas import ChatCompletionChunk, Completion, CompletionChoice, ErrorBody, FinishReason, Usage

END = "[DONE]"
_CHUNK: TypeAdapter[ChatCompletionChunk | Completion] = TypeAdapter(
    Annotated[ChatCompletionChunk | Completion, Field(discriminator="object")]
)


def raise_if_error(data: str) -> None:
    """Raises StreamFailed when an event's data is the server's error object."""
    if data.startswith('{"error"'):
        raise StreamFailed(ErrorBody.model_validate_json(data).error)


class _StreamedText:
    """What a stream has said so far.

    text: all pieces joined. finish_reason, usage: known once the stream has ended by itself.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None

    def _read(self, data: str) -> str:
        """The text in one event, perhaps empty.

        Raises StreamFailed when the event is an error.
        """
        raise_if_error(data)
        chunk = _CHUNK.validate_json(data)
        piece = ""
        for choice in chunk.choices:
            piece += choice.text if isinstance(choice, CompletionChoice) else choice.delta.content or ""
            self.finish_reason = choice.finish_reason or self.finish_reason
        self.usage = chunk.usage or self.usage
        self.text += piece
        return piece


class TextStream(_StreamedText):
    """An iterator over pieces of text, and a context manager that ends the request."""

    def __iter__(self) -> Iterator[str]:
        try:
            for event in EventSource(self.response).iter_sse():
                if event.data == END:
                    return
                if piece := self._read(event.data):
                    yield piece
        except httpx.TransportError as cause:
            raise ConnectionFailed(f"the stream broke off: {cause}") from cause
        finally:
            self.close()

    def close(self) -> None:
        """End the request."""
        self.response.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


class AsyncTextStream(_StreamedText):
    """TextStream for asyncio."""

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for event in EventSource(self.response).aiter_sse():
                if event.data == END:
                    return
                if piece := self._read(event.data):
                    yield piece
        except httpx.TransportError as cause:
            raise ConnectionFailed(f"the stream broke off: {cause}") from cause
        finally:
            await self.close()

    async def close(self) -> None:
        """End the request."""
        await self.response.aclose()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.close()
