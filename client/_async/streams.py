"""Text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
from httpx_sse import EventSource

from reftserve.client.exceptions import ConnectionFailed
from reftserve.client.text_chunks import END, StreamedText


class AsyncTextStream(StreamedText):
    """An iterator over pieces of text, and a context manager that ends the request, on the server too."""

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            async for event in EventSource(self.response).aiter_sse():
                if event.data == END:
                    return
                if piece := self.take(event.data):
                    yield piece
        except httpx.TransportError as cause:
            raise ConnectionFailed(f"the stream from {self.response.url} broke off: {cause}") from cause
        finally:
            await self.close()

    async def close(self) -> None:
        """End the request."""
        await self.response.aclose()

    async def __aenter__(self) -> AsyncTextStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
