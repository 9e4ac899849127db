"""Pairs that unasync cannot derive: `.ci/generate_sync_client.py` puts the second in place of `_async/`'s first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Coroutine[Any, Any, Any]])


async def async_sleep(seconds: float) -> None:
    """Let other tasks run for `seconds`."""
    await asyncio.sleep(seconds)


def sleep(seconds: float) -> None:
    """Block the thread for `seconds`."""
    time.sleep(seconds)


def coroutine_method(method: F) -> F:
    """Return the method: asyncio's form of a property that asks the server."""
    return method


plain_property = property
