"""OpenAI's client and a plain HTTP client for the running server."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import openai
import pytest
from running_server import RunningServer


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
