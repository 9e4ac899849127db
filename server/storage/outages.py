"""Outages of the database or of its disk. Background work waits through them; only an operator can end them."""

from __future__ import annotations

import logging
import time

from sqlalchemy.exc import TimeoutError as PoolTimeout

from reftserve.server.errors import StorageFull
from reftserve.server.storage.database import DATABASE_ERRORS

logger = logging.getLogger(__name__)
UNREACHABLE = (*DATABASE_ERRORS, PoolTimeout)  # the database is away, or all its connections wait
OUTAGES = (*UNREACHABLE, StorageFull)
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
QUIET_S = 60.0  # a failure after this time without one belongs to a new outage


class Outages:
    """The outages that one thread or task meets. Each is logged once, however often it is met, and its pauses grow."""

    def __init__(self) -> None:
        self._met_at = float("-inf")
        self._pause_s = FIRST_PAUSE_S

    def meet(self, cause: Exception) -> float:
        """Log the cause if it begins an outage; return the seconds to wait before the next try."""
        if time.monotonic() - self._met_at > QUIET_S:
            self._pause_s = FIRST_PAUSE_S
            logger.warning("the database cannot be used; trying again until it can: %s", str(cause))
        self._met_at = time.monotonic()
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s

    def wait(self, cause: Exception) -> None:
        """Meet an outage, and pause before the next try."""
        time.sleep(self.meet(cause))
