"""A training job as an object to wait for, watch, pause, cancel and retry; blocking and asynchronous."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, closing, nullcontext, suppress
from typing import Protocol, TypeVar

import httpx
from httpx_sse import EventSource

from reftserve.client import calls
from reftserve.client.calls import Call
from reftserve.client.event_reader import PAUSE_S, EventReader
from reftserve.client.exceptions import JobEnded
from reftserve.client.progress import JobProgress
from reftserve.client.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, JobStatus

T = TypeVar("T")


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


class _Client(Protocol):
    def send(self, call: Call[T], /) -> T: ...

    def open_events(self, reader: EventReader, /) -> httpx.Response: ...


class _AsyncClient(Protocol):
    async def send(self, call: Call[T], /) -> T: ...

    async def open_events(self, reader: EventReader, /) -> httpx.Response: ...


class Job(_JobState):
    """A training job."""

    def __init__(self, client: _Client, data: FineTuningJob) -> None:
        super().__init__(data)
        self._send = client.send
        self._open_events = client.open_events

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

    def events(self, *, timeout_s: float | None = None) -> Iterator[FineTuningEvent]:
        """Everything that happened, oldest first, then what happens until the job has ended.

        A stream that breaks off, as when the server restarts, goes on where it was; ConnectionFailed is raised when no
        server comes back. Raises TimeoutError after `timeout_s`; the job goes on then.
        """
        reader = EventReader(self.id, timeout_s)
        while not reader.ended:
            # Breaking off is no failure: the next stream begins behind the last event.
            with suppress(httpx.TransportError), closing(self._open_events(reader)) as response:
                reader.check(response)
                for message in EventSource(response).iter_sse():
                    if (event := reader.take(message)) is not None:
                        yield event
            if not reader.ended:
                time.sleep(PAUSE_S)
        self.refresh()

    def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> Job:
        """Until it has published its intervention. progress: show a bar in the terminal.

        Raises JobEnded when it failed or was cancelled, TimeoutError after `timeout_s`; the job goes on then.
        """
        with JobProgress() if progress else nullcontext() as bar:
            for event in self.events(timeout_s=timeout_s):
                if bar is not None:
                    bar.update(event)
        self._raise_unless_succeeded()
        return self

    def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Its durable steps, newest first."""
        return self._send(calls.list_checkpoints(self.id))


class AsyncJob(_JobState):
    """Job for asyncio."""

    def __init__(self, client: _AsyncClient, data: FineTuningJob) -> None:
        super().__init__(data)
        self._send = client.send
        self._open_events = client.open_events

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

    async def events(self, *, timeout_s: float | None = None) -> AsyncGenerator[FineTuningEvent]:
        """Everything that happened, oldest first, then what happens until the job has ended.

        A stream that breaks off, as when the server restarts, goes on where it was; ConnectionFailed is raised when no
        server comes back. Raises TimeoutError after `timeout_s`; the job goes on then.
        """
        reader = EventReader(self.id, timeout_s)
        while not reader.ended:
            # Breaking off is no failure: the next stream begins behind the last event.
            with suppress(httpx.TransportError):
                async with aclosing(await self._open_events(reader)) as response:
                    reader.check(response)
                    async for message in EventSource(response).aiter_sse():
                        if (event := reader.take(message)) is not None:
                            yield event
            if not reader.ended:
                await asyncio.sleep(PAUSE_S)
        await self.refresh()

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> AsyncJob:
        """Until it has published its intervention. progress: show a bar in the terminal.

        Raises JobEnded when it failed or was cancelled, TimeoutError after `timeout_s`; the job goes on then.
        """
        with JobProgress() if progress else nullcontext() as bar:
            async for event in self.events(timeout_s=timeout_s):
                if bar is not None:
                    bar.update(event)
        self._raise_unless_succeeded()
        return self

    async def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Its durable steps, newest first."""
        return await self._send(calls.list_checkpoints(self.id))
