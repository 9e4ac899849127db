"""The part of an engine that answers requests; `app.open_services` makes the engine.

Ours is `EngineClient`. Its life belongs to it too: `supervisor.py` uses `start`, `wait`, `until_ready` and `ended`,
`app.py` uses `stop` and `dtype`. A second engine needs them as well.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from reftserve.server.engine.messages import EngineStats, Ready, Submit, TokenOutput


class InferenceEngine(Protocol):
    """An engine that answers requests made of token ids. ready: its sizes; None while it cannot take requests.

    stats: after its latest step.
    """

    ready: Ready | None
    stats: EngineStats | None

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs and its model is loaded."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        ...

    def end_requests(self, reason: str) -> None:
        """End all requests with finish reason "stopped" and this error."""
        ...

    def generate(self, request: Submit) -> AsyncGenerator[TokenOutput]:
        """Yield outputs, the last with a finish reason. Closing the iterator cancels. Raises EngineDied at any time."""
        ...
