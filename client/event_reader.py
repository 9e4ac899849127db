"""A position in a job's events, for both clients. Until the server has sent [DONE], a client opens the stream after the
last event seen, waiting while the server is away, and reads until it breaks or is silent too long.
"""

from __future__ import annotations

import time

import httpx
from httpx_sse import ServerSentEvent

from reftserve.client.calls.call import Call
from reftserve.client.calls.jobs import stream_events
from reftserve.client.exceptions import StreamFailed
from reftserve.client.schemas import ErrorDetail, FineTuningEvent
from reftserve.client.text_chunks import END, raise_if_error

PAUSE_S = 0.2
# Servers send a comment every 15 seconds, so a server that is silent for a minute is gone.
SILENCE_S = 60.0
# A blocked read does not see the deadline, so with a time limit the reader reopens silent streams more often.
SILENCE_BEFORE_DEADLINE_S = 5.0


class EventReader:
    """A position in a job's events. timeout_s: counted from now; None: no limit."""

    def __init__(self, job_id: str, timeout_s: float | None) -> None:
        self.ended = False
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._last: str | None = None

    def next_call(self) -> Call[None]:
        """Return the call that opens the stream after the last event seen. Raises TimeoutError after the deadline."""
        self._check_deadline()
        silence_s = SILENCE_S if self._timeout_s is None else min(SILENCE_BEFORE_DEADLINE_S, self._remaining_s)
        return stream_events(self._job_id, self._last, silence_s)

    def check(self, response: httpx.Response) -> None:
        """Raise StreamFailed when the answer is no event stream, which asking again would not change."""
        found = response.headers.get("Content-Type", "")
        if not found.startswith("text/event-stream"):
            message = f"the events of job {self._job_id} came as {found!r}; expected text/event-stream"
            raise StreamFailed(ErrorDetail(message=message, type="http_error"))

    def take(self, message: ServerSentEvent) -> FineTuningEvent | None:
        """Return a message's event, if any. Raises StreamFailed for an error, TimeoutError after the deadline.

        A server that stops counts as a broken connection: the next one goes on with the stream.
        """
        self._check_deadline()
        if message.data == END:
            self.ended = True
        if message.data in ("", END):  # httpx-sse turns comments into empty messages
            return None
        try:
            raise_if_error(message.data)
        except StreamFailed as failure:
            if failure.code == "server_stopping":
                raise httpx.RemoteProtocolError(failure.message) from failure
            raise
        event = FineTuningEvent.model_validate_json(message.data)
        self._last = event.id
        return event

    @property
    def _remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _check_deadline(self) -> None:
        if self._remaining_s == 0:
            raise TimeoutError(f"job {self._job_id} has not ended after {self._timeout_s} seconds; it goes on")
