"""A connection to a server: sends calls, tries them again, and opens streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import httpx
from tenacity import AsyncRetrying

from reftserve.client.address import connection_options
from reftserve.client.calls.call import Call, M
from reftserve.client.event_reader import EventReader
from reftserve.client.retries import reconnect_policy, retry_policy
from reftserve.client.schemas import Page
from reftserve.client.transport import answered, checked, opened, read_answer

T = TypeVar("T")


class AsyncConnection:
    """A pool of HTTP connections, with one retry policy for all calls."""

    def __init__(self, url: str, api_key: str | None, timeout: httpx.Timeout | float, max_retries: int) -> None:
        self._http = httpx.AsyncClient(timeout=timeout, **connection_options(url, api_key))
        self._max_retries = max_retries

    async def send(self, call: Call[T]) -> T:
        """Return the answer to a call, after retries where they are safe."""
        answer: T = await AsyncRetrying(**retry_policy(call, self._max_retries))(self.send_once, call)
        return answer

    async def send_patiently(self, call: Call[T]) -> T:
        """Return the answer to a call. Waits while the server is away."""
        answer: T = await AsyncRetrying(**reconnect_policy())(self.send_once, call)
        return answer

    async def send_pages(self, page_after: Callable[[str | None], Call[Page[M]]]) -> list[M]:
        """Return the rows of all pages of a list. page_after: makes the call for the page behind an id."""
        rows: list[M] = []
        after = None
        while True:
            page = await self.send(page_after(after))
            rows += page.data
            if not page.has_more:
                return rows
            after = page.last_id

    async def send_once(self, call: Call[T]) -> T:
        """Return the answer to a call, without retries."""
        with opened(call) as arguments, answered(self._http.base_url):
            response = await self._http.request(call.method, call.path, **arguments)
        return read_answer(call, response)

    async def open(self, call: Call[None]) -> httpx.Response:
        """Return the open stream of an answer, after retries where they are safe."""
        return await AsyncRetrying(**retry_policy(call, self._max_retries))(self._open_once, call)

    async def open_events(self, reader: EventReader) -> httpx.Response:
        """Return the open stream of a job's next events. Waits while the server is away."""
        return await AsyncRetrying(**reconnect_policy())(self._open_events_once, reader)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _open_once(self, call: Call[None]) -> httpx.Response:
        with opened(call) as arguments, answered(self._http.base_url):
            request = self._http.build_request(call.method, call.path, **arguments)
            response = await self._http.send(request, stream=True)
            if response.is_error:
                await response.aread()
        return checked(response)

    async def _open_events_once(self, reader: EventReader) -> httpx.Response:
        return await self._open_once(reader.next_call())
