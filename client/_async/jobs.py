"""Training jobs: listing them, and one job to wait for, watch, pause, cancel and retry."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext, suppress

import httpx
from httpx_sse import EventSource

from reftserve.client._async.connection import AsyncConnection
from reftserve.client.calls import jobs as calls
from reftserve.client.concurrency import async_sleep
from reftserve.client.event_reader import PAUSE_S, EventReader
from reftserve.client.exceptions import JobEnded
from reftserve.client.progress import JobProgress
from reftserve.client.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, JobStatus


class AsyncJob:
    """A training job. `data` is the job as the server last described it."""

    def __init__(self, connection: AsyncConnection, data: FineTuningJob) -> None:
        self.data = data
        self._connection = connection

    @property
    def id(self) -> str:
        """`ftjob-...`."""
        return self.data.id

    @property
    def status(self) -> JobStatus:
        """The status at the last refresh."""
        return self.data.status

    @property
    def has_ended(self) -> bool:
        """Whether the job succeeded, failed or was cancelled."""
        return self.data.status in ("succeeded", "failed", "cancelled")

    @property
    def fine_tuned_model(self) -> str | None:
        """`name@version` of the published intervention."""
        return self.data.fine_tuned_model

    async def refresh(self) -> AsyncJob:
        """Ask the server for the job's current state."""
        self.data = await self._connection.send(calls.get_job(self.id))
        return self

    async def cancel(self) -> AsyncJob:
        """End the job at once. It can be retried. Raises Conflict when it has ended."""
        return await self._change("cancel")

    async def pause(self) -> AsyncJob:
        """Pause the job after its current optimizer step. Raises Conflict when it has ended."""
        return await self._change("pause")

    async def resume(self) -> AsyncJob:
        """Continue a paused job. Raises Conflict when it has ended."""
        return await self._change("resume")

    async def retry(self) -> AsyncJob:
        """Run the job again, from its last checkpoint if that still exists. Raises Conflict unless it has failed."""
        return await self._change("retry")

    async def events(self, *, timeout_s: float | None = None) -> AsyncGenerator[FineTuningEvent]:
        """Yield all past events, then new ones until the job has ended, over broken streams and restarts of the server.

        Raises ConnectionFailed when no server comes back, TimeoutError after `timeout_s`; the job itself continues.
        """
        reader = EventReader(self.id, timeout_s)
        while not reader.ended:
            with suppress(httpx.TransportError):
                async with aclosing(await self._connection.open_events(reader)) as response:
                    reader.check(response)
                    async for message in EventSource(response).aiter_sse():
                        if (event := reader.take(message)) is not None:
                            yield event
            if not reader.ended:
                await async_sleep(PAUSE_S)
        self.data = await self._connection.send_patiently(calls.get_job(self.id))

    async def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> AsyncJob:
        """Return when the intervention is published. Raises JobEnded, or TimeoutError while the job continues."""
        with JobProgress() if progress else nullcontext() as bar:
            async for event in self.events(timeout_s=timeout_s):
                if bar is not None:
                    bar.update(event)
        if self.data.status != "succeeded":
            raise JobEnded(self.data)
        return self

    async def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Return the job's durable steps, newest first."""
        return await self._connection.send(calls.list_checkpoints(self.id))

    async def _change(self, action: calls.JobAction) -> AsyncJob:
        self.data = await self._connection.send(calls.change_job(self.id, action))
        return self


class AsyncJobs:
    """`client.jobs`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def list(self, *, after: str | None = None, limit: int = 20) -> list[FineTuningJob]:
        """Return jobs, newest first. after: the id of the last job of the previous page."""
        return await self._connection.send(calls.list_jobs(after, limit))

    async def get(self, job_id: str) -> AsyncJob:
        """Return one job."""
        return AsyncJob(self._connection, await self._connection.send(calls.get_job(job_id)))
