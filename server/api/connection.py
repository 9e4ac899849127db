"""uvicorn's connections with a time limit on request headers, and without chunks for HTTP/1.0."""

from __future__ import annotations

import asyncio
import sys
from typing import ClassVar

from uvicorn._types import ASGISendCallable, ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class Connection(HttpToolsProtocol):
    """A connection that is closed when a request's header takes longer than `header_timeout_s`."""

    header_timeout_s: ClassVar[float]
    _header_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first header."""
        super().connection_made(transport)
        self._expect_header()

    def on_message_begin(self) -> None:
        """Begin to wait for the rest of a header, on a connection that stays open."""
        super().on_message_begin()
        self._expect_header()

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._header_arrived()
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0" and self.cycle is not None:
            self.cycle.send = _without_chunks(self.cycle)  # type: ignore[method-assign, assignment]

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._header_arrived()
        super().connection_lost(exc)

    def _expect_header(self) -> None:
        if self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.header_timeout_s, self._close)

    def _header_arrived(self) -> None:
        if self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _close(self) -> None:
        # abort and not close: a client that reads nothing would keep a closing connection.
        self.transport.abort()


def _without_chunks(cycle: RequestResponseCycle) -> ASGISendCallable:
    """Return the cycle's `send` for HTTP/1.0: the end of an answer of unknown length is the end of the connection."""
    send, is_unknown = cycle.send, False

    async def send_without_chunks(message: ASGISendEvent) -> None:
        nonlocal is_unknown
        if message["type"] == "http.response.start":
            headers = [(name, value) for name, value in message["headers"] if name.lower() != b"connection"]
            message = {**message, "headers": headers}
            is_unknown = all(name.lower() != b"content-length" for name, _ in headers)
            if is_unknown:
                cycle.chunked_encoding = False
                cycle.expected_content_length = sys.maxsize
        elif message["type"] == "http.response.body" and is_unknown and not message.get("more_body", False):
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    return send_without_chunks


def connection_type(header_timeout_s: float) -> type[Connection]:
    """Return the class of connections with this time limit; uvicorn makes its objects."""
    return type("TimedConnection", (Connection,), {"header_timeout_s": header_timeout_s})
