"""How far the events of a job have been read, and how to go on when their stream breaks off.

The blocking and the asynchronous job share it; what differs, opening and reading a connection, is theirs:

    until the server has said [DONE]:
        open the stream behind the last event seen; a server that is away is asked again (`retries.reconnect_policy`)
        read events until it says [DONE], breaks off, or is silent for too long
"""

from __future__ import annotations

import time

import httpx
from httpx_sse import ServerSentEvent

from reftserve.client import calls
from reftserve.client.calls import Call
from reftserve.client.exceptions import StreamFailed
from reftserve.client.schemas import ErrorDetail, FineTuningEvent
from reftserve.client.streams import END, raise_if_error

PAUSE_S = 0.2
# Servers send a comment every 15 seconds, so one that says nothing for so long has gone without a word.
SILENCE_S = 60.0
# Nobody looks at the clock during a read, so with a time limit silent streams are left and opened again.
SILENCE_BEFORE_DEADLINE_S = 5.0


class EventReader:
    """Where a reader of a job's events stands. timeout_s: from now on; None: as long as the job takes."""

    def __init__(self, job_id: str, timeout_s: float | None) -> None:
        self.ended = False
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._last: str | None = None

    def next_call(self) -> Call[None]:
        """Opens the stream behind the last event seen.

        Raises TimeoutError when the time is up.
        """
        self._check_clock()
        silence_s = SILENCE_S if self._timeout_s is None else min(SILENCE_BEFORE_DEADLINE_S, self._remaining_s)
        return calls.stream_events(self._job_id, self._last, silence_s)

    def check(self, response: httpx.Response) -> None:
        """Raises StreamFailed when the answer is no stream: it would be asked for again and again."""
        found = response.headers.get("Content-Type", "")
        if not found.startswith("text/event-stream"):
            message = f"the events of job {self._job_id} came as {found!r}; expected text/event-stream"
            raise StreamFailed(ErrorDetail(message=message, type="http_error"))

    def take(self, message: ServerSentEvent) -> FineTuningEvent | None:
        """The event in a message; None when there is none in it.

        Raises StreamFailed when the server says so, TimeoutError when the time is up.
        """
        self._check_clock()
        if message.data == END:
            self.ended = True
        if message.data in ("", END):  # httpx-sse makes empty messages of comments
            return None
        raise_if_error(message.data)
        event = FineTuningEvent.model_validate_json(message.data)
        self._last = event.id
        return event

    @property
    def _remaining_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _check_clock(self) -> None:
        if self._remaining_s == 0:
            raise TimeoutError(f"job {self._job_id} has not ended after {self._timeout_s} seconds; it goes on")
