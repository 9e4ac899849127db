"""/ready and /metrics answer at once, whatever writers, workers and the database do."""

from __future__ import annotations

import asyncio
import threading
import time
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


async def fetched(app: FastAPI, *paths: str) -> tuple[list[httpx.Response], float]:
    """Return the answers to requests sent together, and the seconds that they took."""
    began = time.monotonic()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        answers = await asyncio.gather(*(http.get(path) for path in paths))
    return list(answers), time.monotonic() - began


def test_serving_is_ready_without_a_training_worker(app: FastAPI, tmp_path: Path) -> None:
    (answer,), _ = asyncio.run(fetched(app, "/ready"))
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "model": True, "worker": False, "database": True}
    (tmp_path / "worker.heartbeat").touch()
    (answer,), _ = asyncio.run(fetched(app, "/ready"))
    assert answer.json()["worker"] is True


def test_readiness_and_metrics_wait_for_no_writer(app: FastAPI, database: Database) -> None:
    with database.session() as writer:
        writer.execute(text("SELECT 1"))
        answers, seconds = asyncio.run(fetched(app, "/ready", "/metrics"))
    assert [answer.status_code for answer in answers] == [200, 200]
    assert "reftserve_ready 1.0" in answers[1].text
    assert seconds < health.CHECK_S / 2


def test_readiness_does_not_wait_for_the_threads_of_other_endpoints(app: FastAPI) -> None:
    release = threading.Event()

    async def beside_a_full_pool() -> tuple[list[httpx.Response], float]:
        limiter = anyio.to_thread.current_default_thread_limiter()
        count = int(limiter.total_tokens)
        waiting = [asyncio.create_task(anyio.to_thread.run_sync(release.wait)) for _ in range(count)]
        while limiter.borrowed_tokens < count:
            await asyncio.sleep(0.01)
        try:
            return await fetched(app, "/ready")
        finally:
            release.set()
            await asyncio.gather(*waiting)

    (answer,), seconds = asyncio.run(beside_a_full_pool())
    assert answer.status_code == 200
    assert seconds < health.CHECK_S / 2


def test_a_database_that_does_not_answer_makes_the_server_unready_within_the_time_limit(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(health, "CHECK_S", 0.2)
    monkeypatch.setattr(Database, "is_reachable", lambda _: release.wait(10))
    probes = int(health._threads.total_tokens) + 2
    answers, seconds = asyncio.run(_released(app, release, probes))
    assert [answer.status_code for answer in answers] == [503] * probes
    assert answers[0].json()["database"] is False
    assert seconds < 2


async def _released(app: FastAPI, release: threading.Event, count: int) -> tuple[list[httpx.Response], float]:
    try:
        return await fetched(app, *["/ready"] * count)
    finally:
        release.set()


def test_a_lost_database_makes_the_server_unready(app: FastAPI, tmp_path: Path) -> None:
    app.state.services.database = Database(f"sqlite:///{tmp_path / 'nowhere' / 'test.db'}")
    (answer,), _ = asyncio.run(fetched(app, "/ready"))
    assert (answer.status_code, answer.json()["database"]) == (503, False)


def test_a_heartbeat_that_cannot_be_looked_at_is_no_error(app: FastAPI) -> None:
    def gone(*_: Any, **__: Any) -> Any:
        raise NotADirectoryError(20, "gone")

    app.state.services.settings = SimpleNamespace(heartbeat_file=SimpleNamespace(stat=gone))
    (answer,), _ = asyncio.run(fetched(app, "/ready"))
    assert (answer.status_code, answer.json()["worker"]) == (200, False)
