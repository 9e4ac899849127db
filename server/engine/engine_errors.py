"""Errors of the engine: `EngineError` and its two kinds."""

from __future__ import annotations


class EngineError(Exception):
    """Base class of the engine's errors."""


class RequestRefused(EngineError):
    """One request can never run (too long for the cache, edits do not fit the base); others are unaffected."""


class EngineDied(EngineError):
    """The engine's process has ended; its requests are lost."""
