"""The part of an engine that answers requests; `app.open_services` makes the engine.

`engine_client.py` is our engine, in a process of its own. Its life (start, wait, stop, the weights that it lends) is
`EngineClient`'s, which `supervisor.py` uses: a second engine needs such a client too.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from reftserve.server.engine.messages import Ready, Submit, TokenOutput


class InferenceEngine(Protocol):
    """An engine that answers requests made of token ids.

    ready: the engine's sizes; None while it cannot take requests.
    """

    ready: Ready | None

    @property
    def is_alive(self) -> bool:
        """Whether the engine runs and its model is loaded."""
        ...

    @property
    def num_requests(self) -> int:
        """Requests that wait or run."""
        ...

    def generate(self, request: Submit) -> AsyncGenerator[TokenOutput]:
        """Yield a request's tokens as they come; the last output has a finish reason. Closing the iterator cancels.

        Raises EngineDied when the engine is not there or dies meanwhile.
        """
        ...
