"""Errors of the engine.

EngineError
├── UnsupportedModel     the base cannot be served by this engine; says which property is in the way
├── RequestRefused       this one request can never run (too long for the cache, edits do not fit the base)
└── EngineDied           the engine's process is not there; requests that it ran are lost
"""

from __future__ import annotations


class EngineError(Exception):
    """Anything the engine raises on purpose."""


class UnsupportedModel(EngineError):
    """The base cannot be served by this engine."""


class RequestRefused(EngineError):
    """One request can never run; others are not touched."""


class EngineDied(EngineError):
    """The engine's process is not there."""
