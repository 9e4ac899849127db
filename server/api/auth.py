"""Who is asking. Until API keys exist everyone is the one default owner; every row already carries it."""

from __future__ import annotations

DEFAULT_OWNER = "default"


async def owner() -> str:
    """The owner on whose behalf a request is made; a FastAPI dependency."""
    return DEFAULT_OWNER
