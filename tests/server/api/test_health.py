"""/ready and /metrics answer at once, whatever writers, workers and the database do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio.to_thread
import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import text

from reftserve.server.api import health
from reftserve.server.inference.metrics import Metrics
from reftserve.server.settings import Settings
from reftserve.server.storage.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path / 'test.db'}")
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture
def app(database: Database, tmp_path: Path) -> FastAPI:
    app = FastAPI()
    app.state.services = SimpleNamespace(
        database=database,
        inference=SimpleNamespace(is_ready=True),
        settings=Settings(data=tmp_path),
        metrics=Metrics(lambda: None),
    )
    app.include_router(health.router)
    return app


async def fetched(app: FastAPI, *paths: str) -> list[httpx.Response]:
    """Return the answers to requests sent together."""
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        return list(await asyncio.gather(*(http.get(path) for path in paths)))


def test_serving_is_ready_without_a_training_worker(app: FastAPI, tmp_path: Path) -> None:
    (answer,) = asyncio.run(fetched(app, "/ready"))
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "model": True, "worker": False, "database": True}
    (tmp_path / "worker.heartbeat").touch()
    (answer,) = asyncio.run(fetched(app, "/ready"))
    assert answer.json()["worker"] is True


def test_readiness_and_metrics_wait_for_no_writer(app: FastAPI, database: Database) -> None:
    with database.session() as writer:
        writer.execute(text("SELECT 1"))
        # The writer commits after the answers.
        answers = asyncio.run(fetched(app, "/ready", "/metrics"))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert "reftserve_ready 1.0" in answers[1].text


def test_readiness_does_not_wait_for_the_threads_of_other_endpoints(app: FastAPI) -> None:
    release = threading.Event()

    async def beside_a_full_pool() -> list[httpx.Response]:
        limiter = anyio.to_thread.current_default_thread_limiter()
        count = int(limiter.total_tokens)
        waiting = [asyncio.create_task(anyio.to_thread.run_sync(release.wait)) for _ in range(count)]
        while limiter.borrowed_tokens < count:
            await asyncio.sleep(0.01)
        try:
            return await fetched(app, "/ready")  # the pool is full until the answer
        finally:
            release.set()
            await asyncio.gather(*waiting)

    (answer,) = asyncio.run(beside_a_full_pool())
    assert answer.status_code == 200


def test_a_database_that_does_not_answer_makes_the_server_unready_within_the_time_limit(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(health, "CHECK_S", 0.2)
    ended: list[bool] = []

    def silent(_: Database) -> bool:
        ended.append(release.wait(60))
        return True

    monkeypatch.setattr(Database, "is_reachable", silent)
    probes = int(health._threads.total_tokens) + 2

    async def answers_before_the_database() -> list[httpx.Response]:
        try:
            answers = await fetched(app, *["/ready"] * probes)
            assert not ended
            return answers
        finally:
            release.set()

    answers = asyncio.run(answers_before_the_database())
    assert [answer.status_code for answer in answers] == [503] * probes
    assert answers[0].json()["database"] is False


def test_a_lost_database_makes_the_server_unready(app: FastAPI, tmp_path: Path) -> None:
    app.state.services.database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'test.db'}")
    (answer,) = asyncio.run(fetched(app, "/ready"))
    assert (answer.status_code, answer.json()["database"]) == (503, False)


def test_a_heartbeat_that_cannot_be_looked_at_is_no_error(app: FastAPI) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise NotADirectoryError(20, "gone")

    app.state.services.settings = SimpleNamespace(heartbeat_file=SimpleNamespace(stat=gone))
    (answer,) = asyncio.run(fetched(app, "/ready"))
    assert (answer.status_code, answer.json()["worker"]) == (200, False)
