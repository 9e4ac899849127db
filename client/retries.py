"""Retry policies: the failures that are tried again, and the waits between attempts."""

from __future__ import annotations

from typing import Any

import httpx
from tenacity import RetryCallState, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential_jitter
from tenacity.wait import wait_base

from reftserve.client.calls.call import Call
from reftserve.client.exceptions import ConnectionFailed, Overloaded, ServerFault, Unavailable

FIRST_WAIT_S = 0.2
LONGEST_WAIT_S = 10.0
RECONNECT_S = 300.0
LONGEST_RECONNECT_WAIT_S = 2.0


def retry_policy(call: Call[Any], max_retries: int) -> dict[str, Any]:
    """Return tenacity's arguments. Every call is tried again after 429, 503 or a refused connection: nothing has begun.

    After a broken connection only idempotent calls are tried again.
    """

    def is_transient(failure: BaseException) -> bool:
        if isinstance(failure, ConnectionFailed):
            return call.is_idempotent or isinstance(failure.__cause__, httpx.ConnectError)
        return isinstance(failure, (Overloaded, Unavailable))

    return {
        "retry": retry_if_exception(is_transient),
        "stop": stop_after_attempt(max_retries + 1),
        "wait": _BackoffOrRetryAfter(LONGEST_WAIT_S),
        "reraise": True,
    }


def reconnect_policy() -> dict[str, Any]:
    """Return the arguments for the stream of a job's events, which outlives restarts of the server."""

    def is_restarting(failure: BaseException) -> bool:
        # A proxy answers 502 or 504 while the server behind it is away.
        is_proxy = isinstance(failure, ServerFault) and failure.status in (502, 504)
        return is_proxy or isinstance(failure, (ConnectionFailed, Overloaded, Unavailable))

    return {
        "retry": retry_if_exception(is_restarting),
        "stop": stop_after_delay(RECONNECT_S),
        "wait": _BackoffOrRetryAfter(LONGEST_RECONNECT_WAIT_S),
        "reraise": True,
    }


class _BackoffOrRetryAfter(wait_base):
    """Wait as long as Retry-After says, else exponential backoff with jitter; at most `longest_s`."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._backoff = wait_exponential_jitter(initial=FIRST_WAIT_S, max=longest_s, jitter=FIRST_WAIT_S)

    def __call__(self, retry_state: RetryCallState) -> float:
        failure = retry_state.outcome.exception() if retry_state.outcome is not None else None
        asked = getattr(failure, "retry_after_s", None)
        return min(asked, self._longest_s) if asked is not None else self._backoff(retry_state)
