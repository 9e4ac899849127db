# Generated from client/_async/streams.py by `make generate`. Change that file instead.
"""Text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
from httpx_sse import EventSource

from reftserve.client.exceptions import ConnectionFailed
from reftserve.client.text_chunks import END, StreamedText


class TextStream(StreamedText):
    """An iterator over pieces of text, and a context manager that ends the request, on the server too."""

    def __iter__(self) -> Iterator[str]:
        try:
            for event in EventSource(self.response).iter_sse():
                if event.data == END:
                    return
                if piece := self.take(event.data):
                    yield piece
        except httpx.TransportError as cause:
            raise ConnectionFailed(f"the stream from {self.response.url} broke off: {cause}") from cause
        finally:
            self.close()

    def close(self) -> None:
        """End the request."""
        self.response.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
