"""Threads of an endpoint that blocks for long, so that the default pool stays free for prompts and other endpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from reftserve.server.errors import Overloaded

MAX_WAITING = 16
RETRY_AFTER_S = 10.0

T = TypeVar("T")


class OwnThreads:
    """Runs an endpoint's calls in `threads` threads; MAX_WAITING more calls wait. what: names the calls in errors."""

    def __init__(self, what: str, *, threads: int) -> None:
        self._what = what
        self._limiter = CapacityLimiter(threads)
        self._most = threads + MAX_WAITING
        self._calls = 0  # the limiter counts those that wait only after they have let others run

    async def run(self, function: Callable[[], T]) -> T:
        """Return the function's result. Raises Overloaded at once if too many calls wait."""
        if self._calls >= self._most:
            raise Overloaded(f"{MAX_WAITING} {self._what} are waiting already; try again", retry_after_s=RETRY_AFTER_S)
        self._calls += 1
        try:
            return await to_thread.run_sync(function, limiter=self._limiter)
        finally:
            self._calls -= 1
