"""A training job as an object to wait for, watch, pause, cancel and retry; blocking and asynchronous."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import nullcontext
from typing import Protocol, TypeVar

from reftserve.client import calls
from reftserve.client.calls import Call
from reftserve.client.exceptions import JobEnded
from reftserve.client.progress import JobProgress
from reftserve.client.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, JobStatus, Page

T = TypeVar("T")
POLL_S = 0.5
EVENTS_PER_PAGE = 100


class _JobState:
    """What was last heard of a job; `data` is all of it."""

    def __init__(self, data: FineTuningJob) -> None:
        self.data = data

    @property
    def id(self) -> str:
        """`ftjob-...`."""
        return self.data.id

    @property
    def status(self) -> JobStatus:
        """As of the last refresh."""
        return self.data.status

    @property
    def has_ended(self) -> bool:
        """Whether it succeeded, failed or was cancelled."""
        return self.data.status in ("succeeded", "failed", "cancelled")

    @property
    def fine_tuned_model(self) -> str | None:
        """`name@version` of what it published."""
        return self.data.fine_tuned_model

    def _raise_unless_succeeded(self) -> None:
        if self.data.status != "succeeded":
            raise JobEnded(self.data)


class _NewEvents:
    """Gathers pages, newest first, until one reaches back to what was seen before."""

    def __init__(self, last_seen: str | None) -> None:
        self._last_seen = last_seen
        self._gathered: list[FineTuningEvent] = []

    def add(self, page: Page[FineTuningEvent]) -> str | None:
        """Take a page; the `after` of the next one to fetch, or None when this was the last."""
        for event in page.data:
            if event.id == self._last_seen:
                return None
            self._gathered.append(event)
        return page.data[-1].id if page.has_more else None

    @property
    def in_order(self) -> list[FineTuningEvent]:
        """Oldest first."""
        return self._gathered[::-1]


class _Deadline:
    """When to stop waiting; None: never."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._at = float("inf") if timeout_s is None else time.monotonic() + timeout_s

    def check(self, job: _JobState) -> None:
        """Raises TimeoutError when it has passed."""
        if time.monotonic() > self._at:
            raise TimeoutError(f"job {job.id} is still {job.status} after {self._timeout_s} seconds; it goes on")


class _Send(Protocol):
    def __call__(self, call: Call[T], /) -> T: ...


class _SendAsync(Protocol):
    def __call__(self, call: Call[T], /) -> Awaitable[T]: ...


class Job(_JobState):
    """A training job."""

    def __init__(self, send: _Send, data: FineTuningJob) -> None:
        super().__init__(data)
        self._send = send

    def refresh(self) -> Job:
        """Ask the server how it stands."""
        self.data = self._send(calls.get_job(self.id))
        return self

    def cancel(self) -> Job:
        """End it at once; it can be retried. Raises Conflict when it has ended."""
        self.data = self._send(calls.cancel_job(self.id))
        return self

    def pause(self) -> Job:
        """Let it rest after its current optimizer step; `paused` then. Raises Conflict when it has ended."""
        self.data = self._send(calls.pause_job(self.id))
        return self

    def resume(self) -> Job:
        """Let it go on where it stands. Raises Conflict when it has ended."""
        self.data = self._send(calls.resume_job(self.id))
        return self

    def retry(self) -> Job:
        """Try it again, from its last checkpoint if that is still kept. Raises Conflict unless it has failed."""
        self.data = self._send(calls.retry_job(self.id))
        return self

    def events(self, *, timeout_s: float | None = None, poll_s: float = POLL_S) -> Iterator[FineTuningEvent]:
        """Everything that happened, oldest first, then what happens until the job has ended.

        Raises TimeoutError after `timeout_s`; the job goes on then.
        """
        deadline = _Deadline(timeout_s)
        last: str | None = None
        while True:
            self.refresh()  # before the events are read, so that none of an ended job is missed
            for event in self._events_since(last):
                yield event
                last = event.id
            if self.has_ended:
                return
            deadline.check(self)
            time.sleep(poll_s)

    def wait(self, *, progress: bool = False, timeout_s: float | None = None, poll_s: float = POLL_S) -> Job:
        """Until it has published its intervention. progress: show a bar in the terminal.

        Raises JobEnded when it failed or was cancelled, TimeoutError after `timeout_s`; the job goes on then.
        """
        with JobProgress() if progress else nullcontext() as bar:
            for event in self.events(timeout_s=timeout_s, poll_s=poll_s):
                if bar is not None:
                    bar.update(event)
        self._raise_unless_succeeded()
        return self

    def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Its durable steps, newest first."""
        return self._send(calls.list_checkpoints(self.id))

    def _events_since(self, last: str | None) -> list[FineTuningEvent]:
        new = _NewEvents(last)
        after = new.add(self._send(calls.list_events(self.id, None, EVENTS_PER_PAGE)))
        while after is not None:
            after = new.add(self._send(calls.list_events(self.id, after, EVENTS_PER_PAGE)))
        return new.in_order


class AsyncJob(_JobState):
    """Job for asyncio."""

    def __init__(self, send: _SendAsync, data: FineTuningJob) -> None:
        super().__init__(data)
        self._send = send

    async def refresh(self) -> AsyncJob:
        """Ask the server how it stands."""
        self.data = await self._send(calls.get_job(self.id))
        return self

    async def cancel(self) -> AsyncJob:
        """End it at once; it can be retried. Raises Conflict when it has ended."""
        self.data = await self._send(calls.cancel_job(self.id))
        return self

    async def pause(self) -> AsyncJob:
        """Let it rest after its current optimizer step; `paused` then. Raises Conflict when it has ended."""
        self.data = await self._send(calls.pause_job(self.id))
        return self

    async def resume(self) -> AsyncJob:
        """Let it go on where it stands. Raises Conflict when it has ended."""
        self.data = await self._send(calls.resume_job(self.id))
        return self

    async def retry(self) -> AsyncJob:
        """Try it again, from its last checkpoint if that is still kept. Raises Conflict unless it has failed."""
        self.data = await self._send(calls.retry_job(self.id))
        return self

    async def events(
        self, *, timeout_s: float | None = None, poll_s: float = POLL_S
    ) -> AsyncGenerator[FineTuningEvent]:
        """Everything that happened, oldest first, then what happens until the job has ended.

        Raises TimeoutError after `timeout_s`; the job goes on then.
        """
        deadline = _Deadline(timeout_s)
        last: str | None = None
        while True:
            await self.refresh()  # before the events are read, so that none of an ended job is missed
            for event in await self._events_since(last):
                yield event
                last = event.id
            if self.has_ended:
                return
            deadline.check(self)
            await asyncio.sleep(poll_s)

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None, poll_s: float = POLL_S) -> AsyncJob:
        """Until it has published its intervention. progress: show a bar in the terminal.

        Raises JobEnded when it failed or was cancelled, TimeoutError after `timeout_s`; the job goes on then.
        """
        with JobProgress() if progress else nullcontext() as bar:
            async for event in self.events(timeout_s=timeout_s, poll_s=poll_s):
                if bar is not None:
                    bar.update(event)
        self._raise_unless_succeeded()
        return self

    async def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Its durable steps, newest first."""
        return await self._send(calls.list_checkpoints(self.id))

    async def _events_since(self, last: str | None) -> list[FineTuningEvent]:
        new = _NewEvents(last)
        after = new.add(await self._send(calls.list_events(self.id, None, EVENTS_PER_PAGE)))
        while after is not None:
            after = new.add(await self._send(calls.list_events(self.id, after, EVENTS_PER_PAGE)))
        return new.in_order
