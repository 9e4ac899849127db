"""Errors of the engine.

EngineError
├── RequestRefused       one request can never run (too long for the cache, edits do not fit the base)
└── EngineDied           the engine's process has ended; its requests are lost
"""

from __future__ import annotations


class EngineError(Exception):
    """Base class of the engine's errors."""


class RequestRefused(EngineError):
    """One request can never run; others are unaffected."""


class EngineDied(EngineError):
    """The engine's process has ended."""
