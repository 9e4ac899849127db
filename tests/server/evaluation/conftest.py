"""A plain HTTP client of the running server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from running_server import RunningServer


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
