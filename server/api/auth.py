"""The owner of a request. There are no API keys yet, so every request and row has the default owner."""

from __future__ import annotations

DEFAULT_OWNER = "default"


async def owner() -> str:
    """Return the owner of a request; a FastAPI dependency."""
    return DEFAULT_OWNER
