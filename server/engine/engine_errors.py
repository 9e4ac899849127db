"""Errors of the engine.

EngineError
├── RequestRefused       this one request can never run (too long for the cache, edits do not fit the base)
└── EngineDied           the engine's process is not there; requests that it ran are lost
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything the engine raises on purpose."""


class RequestRefused(EngineError):
    """One request can never run; others are not touched."""


class EngineDied(EngineError):
    """The engine's process is not there."""
