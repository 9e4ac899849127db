# Generated from client/_async/jobs.py by `make generate`. Change that file instead.
"""Training jobs: listing them, and one job to wait for, watch, pause, cancel and retry."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing, nullcontext, suppress

import httpx
from httpx_sse import EventSource

from reftserve.client._sync.connection import Connection
from reftserve.client.calls import jobs as calls
from reftserve.client.concurrency import sleep
from reftserve.client.event_reader import PAUSE_S, EventReader
from reftserve.client.exceptions import JobEnded
from reftserve.client.progress import JobProgress
from reftserve.client.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, JobStatus


class Job:
    """A training job. `data` is the job as the server last described it."""

    def __init__(self, connection: Connection, data: FineTuningJob) -> None:
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

    def refresh(self) -> Job:
        """Ask the server for the job's current state."""
        self.data = self._connection.send(calls.get_job(self.id))
        return self

    def cancel(self) -> Job:
        """End the job at once. It can be retried. Raises Conflict when it has ended."""
        return self._change("cancel")

    def pause(self) -> Job:
        """Pause the job after its current optimizer step. Raises Conflict when it has ended."""
        return self._change("pause")

    def resume(self) -> Job:
        """Continue a paused job. Raises Conflict when it has ended."""
        return self._change("resume")

    def retry(self) -> Job:
        """Run the job again, from its last checkpoint if that still exists. Raises Conflict unless it has failed."""
        return self._change("retry")

    def events(self, *, timeout_s: float | None = None) -> Generator[FineTuningEvent]:
        """Yield all past events, then new ones until the job has ended, over broken streams and restarts of the server.

        Raises ConnectionFailed when no server comes back, TimeoutError after `timeout_s`; the job itself continues.
        """
        reader = EventReader(self.id, timeout_s)
        while not reader.ended:
            with suppress(httpx.TransportError):
                with closing(self._connection.open_events(reader)) as response:
                    reader.check(response)
                    for message in EventSource(response).iter_sse():
                        if (event := reader.take(message)) is not None:
                            yield event
            if not reader.ended:
                sleep(PAUSE_S)
        self.data = self._connection.send_patiently(calls.get_job(self.id))

    def wait(self, *, progress: bool = False, timeout_s: float | None = None) -> Job:
        """Return when the intervention is published. Raises JobEnded, or TimeoutError while the job continues."""
        with JobProgress() if progress else nullcontext() as bar:
            for event in self.events(timeout_s=timeout_s):
                if bar is not None:
                    bar.update(event)
        if self.data.status != "succeeded":
            raise JobEnded(self.data)
        return self

    def checkpoints(self) -> list[FineTuningCheckpoint]:
        """Return the job's durable steps, newest first."""
        return self._connection.send(calls.list_checkpoints(self.id))

    def _change(self, action: calls.JobAction) -> Job:
        self.data = self._connection.send(calls.change_job(self.id, action))
        return self


class Jobs:
    """`client.jobs`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self, *, after: str | None = None, limit: int = 20) -> list[FineTuningJob]:
        """Return jobs, newest first. after: the id of the last job of the previous page."""
        return self._connection.send(calls.list_jobs(after, limit))

    def get(self, job_id: str) -> Job:
        """Return one job."""
        return Job(self._connection, self._connection.send(calls.get_job(job_id)))
