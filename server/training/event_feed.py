"""The live stream of a job's events, for any number of watchers in one event loop.

A worker writes events to the database and knows no watchers, so the watchers poll. The watchers of one job share a
tail: the first watcher that finds the last query too old runs the next one, and all of them read its result.

    watcher ─┐
    watcher ─┼─► _Tail of the job ──(a query at most every POLL_S, in a thread)──► database
    watcher ─┘
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from weakref import WeakValueDictionary

from sqlalchemy import select

from reftserve.server.errors import Unavailable
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Job, JobEvent

POLL_S = 0.25
RETRY_AFTER_S = 1.0
PAGE = 200
KEPT = 5 * PAGE


class EventFeed:
    """Follows the events of jobs; watchers of the same job share its queries."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Only the watchers of a job hold its tail, so it goes with the last of them.
        self._tails: WeakValueDictionary[str, _Tail] = WeakValueDictionary()
        self._is_closed = False

    def close(self) -> None:
        """End all streams with Unavailable; their clients go on with a later server."""
        self._is_closed = True

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[JobEvent]:
        """Yield events numbered above `after` in order, then new ones as they are written, until the job has ended.

        Raises Unavailable when the feed is closed.
        """
        tail = self._tails.setdefault(job_id, _Tail(after))
        while True:
            if self._is_closed:
                raise Unavailable("the server is stopping", code="server_stopping", retry_after_s=RETRY_AFTER_S)
            await self._poll(job_id, tail)
            is_behind = after < tail.first
            events = await self._page(job_id, after) if is_behind else tail.above(after)
            is_last = tail.ended and not is_behind
            for event in events:
                yield event
                after = event.number
            if is_last:
                return
            if not events and not tail.has_more:
                await asyncio.sleep(POLL_S)

    def has(self, job_id: str, number: int) -> bool:
        """Return whether the job has an event with this number."""
        with self._database.reading() as session:
            return session.get(JobEvent, (job_id, number)) is not None

    async def _poll(self, job_id: str, tail: _Tail) -> None:
        async with tail.lock:
            if tail.has_more or time.monotonic() - tail.polled_at >= POLL_S:
                tail.extend(*await asyncio.to_thread(self._read, job_id, tail.newest))

    async def _page(self, job_id: str, after: int) -> Sequence[JobEvent]:
        return (await asyncio.to_thread(self._read, job_id, after))[0]

    def _read(self, job_id: str, after: int) -> tuple[Sequence[JobEvent], bool]:
        """Return up to PAGE events above a number, in order, and whether the job had ended before they were read."""
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > after)
        with self._database.reading() as session:
            # Status first: the transaction that ends a job also writes its last event.
            status = session.scalar(select(Job.status).where(Job.id == job_id))
            events = session.scalars(query.order_by(JobEvent.number).limit(PAGE)).all()
        return events, status in Job.ENDED


class _Tail:
    """A job's newest events, up to KEPT, above `first`. has_more: the last page was full. ended: none follows."""

    def __init__(self, newest: int) -> None:
        self.lock = asyncio.Lock()
        self.first = self.newest = newest
        self.polled_at = float("-inf")
        self.has_more = False
        self.ended = False
        self._events: deque[JobEvent] = deque(maxlen=KEPT)

    def extend(self, events: Sequence[JobEvent], ended: bool) -> None:
        self._events.extend(events)
        if events:
            self.newest = events[-1].number
            self.first = self._events[0].number - 1
        self.has_more = len(events) == PAGE
        self.ended = ended and not self.has_more
        self.polled_at = time.monotonic()

    def above(self, number: int) -> list[JobEvent]:
        return [event for event in self._events if event.number > number]
