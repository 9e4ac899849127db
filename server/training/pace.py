"""The estimate of a training run's remaining time."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pace:
    """The mean wall time per step of a trial since the run began, validation and checkpoints included."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._done = 0

    def eta_s(self, done: int, left: int) -> float:
        """Return the seconds left. done: steps of all trials since the last call; left: steps to come."""
        self._done += done
        return (self._clock() - self._began) / self._done * left
