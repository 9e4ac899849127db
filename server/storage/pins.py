"""Pins keep blobs that are in use: a blob that is deleted meanwhile goes when its last pin does.

The event loop pins and unpins, so the lock is held for dictionary operations only.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

REMEMBER_S = 600.0  # longer than any request takes from looking a blob up to pinning it


class Pins:
    """Counts the pins of each blob, by its key, in this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._doomed: set[str] = set()
        self._deleted: dict[str, float] = {}

    def add(self, key: str) -> bool:
        """Pin a blob; return False if it was deleted before its first pin."""
        with self._lock:
            if key in self._deleted:
                return False
            self._counts[key] += 1
            return True

    def remove(self, key: str) -> bool:
        """Undo one `add`; return True if the blob was doomed meanwhile and the caller must delete it."""
        with self._lock:
            self._counts[key] -= 1
            if self._counts[key]:
                return False
            del self._counts[key]
            if key not in self._doomed:
                return False
            self._doomed.remove(key)
            self._remember([key])
            return True

    def count(self, key: str) -> int:
        """Return the number of pins of a blob."""
        with self._lock:
            return self._counts.get(key, 0)

    def doom(self, keys: list[str]) -> list[str]:
        """Note that blobs have been deleted; return those without pins, which the caller must remove now."""
        with self._lock:
            free = [key for key in keys if not self._counts.get(key)]
            self._doomed.update(key for key in keys if self._counts.get(key))
            self._remember(free)
            return free

    def _remember(self, keys: list[str]) -> None:
        now = time.monotonic()
        expired = [key for key, moment in self._deleted.items() if now - moment > REMEMBER_S]
        for key in expired:
            del self._deleted[key]
        self._deleted.update(dict.fromkeys(keys, now))
