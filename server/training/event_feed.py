"""The events of a job as they are written, for everyone who watches it.

A worker writes events into the database and knows of no watcher, so somebody has to look. Whoever finds that the last
look is too long ago takes the next one, and all others who watch the same job take what it found:

    watcher ─┐
    watcher ─┼─► _Tail of the job ──(a query at most every POLL_S, in a thread)──► database
    watcher ─┘

Between looks a watcher is a sleeping coroutine; one that goes away leaves nothing behind. For one event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from weakref import WeakValueDictionary

from sqlalchemy import select

from reftserve.server.storage.database import Database
from reftserve.server.storage.leases import ENDED
from reftserve.server.storage.tables import Job, JobEvent

POLL_S = 0.25
PAGE = 200
KEPT = 5 * PAGE


class EventFeed:
    """Follows the events of any number of jobs."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # Kept alive by those who follow; the last one to go takes it along.
        self._tails: WeakValueDictionary[str, _Tail] = WeakValueDictionary()

    async def follow(self, job_id: str, after: int) -> AsyncGenerator[JobEvent]:
        """Events with a number above `after`, in order, then those to come, until the job has ended."""
        tail = self._tails.setdefault(job_id, _Tail(after))
        while True:
            await self._look(job_id, tail)
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
        """Whether the job has an event of this number."""
        with self._database.reading() as session:
            return session.get(JobEvent, (job_id, number)) is not None

    async def _look(self, job_id: str, tail: _Tail) -> None:
        async with tail.lock:
            if tail.has_more or time.monotonic() - tail.looked_at >= POLL_S:
                tail.take(*await asyncio.to_thread(self._read, job_id, tail.newest))

    async def _page(self, job_id: str, after: int) -> Sequence[JobEvent]:
        """For a watcher who is so far behind that the tail has moved on."""
        return (await asyncio.to_thread(self._read, job_id, after))[0]

    def _read(self, job_id: str, after: int) -> tuple[Sequence[JobEvent], bool]:
        """A page of events above a number, in order; and whether the job had ended before them."""
        query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > after)
        with self._database.reading() as session:
            # Status first: a job's last event is committed together with its end.
            status = session.scalar(select(Job.status).where(Job.id == job_id))
            events = session.scalars(query.order_by(JobEvent.number).limit(PAGE)).all()
        return events, status in ENDED


class _Tail:
    """The newest events of a job.

    first, newest: the numbers before the first and of the last event that is kept. has_more: the last look found a
    whole page, so there is more at once. ended: the job had ended before that look, and nothing comes behind `newest`.
    """

    def __init__(self, newest: int) -> None:
        self.lock = asyncio.Lock()
        self.first = self.newest = newest
        self.looked_at = float("-inf")
        self.has_more = False
        self.ended = False
        self._events: deque[JobEvent] = deque(maxlen=KEPT)

    def take(self, events: Sequence[JobEvent], ended: bool) -> None:
        """What a look found above `newest`."""
        self._events.extend(events)
        if events:
            self.newest = events[-1].number
            self.first = self._events[0].number - 1
        self.has_more = len(events) == PAGE
        self.ended = ended and not self.has_more
        self.looked_at = time.monotonic()

    def above(self, number: int) -> list[JobEvent]:
        """Kept events with a number above this."""
        return [event for event in self._events if event.number > number]
