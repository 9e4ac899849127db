"""Errors of the engine: `EngineError` and its two kinds."""

from __future__ import annotations


class EngineError(Exception):
    """Base class of the engine's errors."""


class RequestRefused(EngineError):
    """One request can never run (too long for the cache, edits do not fit the base); others are unaffected."""


class EngineDied(EngineError):
    """The engine's process has ended; its requests are lost.

    was_running: whether its last steps computed this request, which may then be the cause.
    """

    def __init__(self, message: str, *, was_running: bool = False) -> None:
        super().__init__(message)
        self.was_running = was_running
