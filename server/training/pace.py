"""How fast a run goes, and when it will have ended."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """Wall time for each step of each trial since the run began, validation and checkpoints included."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._done = 0

    def eta_s(self, done: int, left: int) -> float:
        """Seconds until the end. done: steps of trials since it was last asked; left: those to come."""
        self._done += done
        return (self._clock() - self._began) / self._done * left
