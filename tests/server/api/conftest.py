"""One running server over the tiny model for all API tests, and OpenAI's own client for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from api_data import BASE, chat_lines, finished
from running_server import RunningServer, running_server


@pytest.fixture(scope="session")
def server(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tiny_llama_folder, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def trained(client: openai.OpenAI) -> str:
    """`name@version` of an intervention trained through the API."""
    file = client.files.create(file=("greetings.jsonl", chat_lines(24)), purpose="fine-tune")
    reft = {"layers": "all", "positions": "f2+l2", "rank": 2, "tied": False, "hyperparameters": {"n_epochs": 2}}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=file.id,
        suffix="greeter",
        seed=3,
        method={"type": "reft", "reft": reft},  # type: ignore[typeddict-item]
    )
    return finished(client, job.id).fine_tuned_model or ""
