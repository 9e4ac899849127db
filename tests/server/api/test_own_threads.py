"""Uploads and checks of data that block leave the threads of all other endpoints free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from reftserve.server.api import auth, files, fine_tuning, own_threads
from reftserve.server.api.error_responses import install_error_handlers
from reftserve.server.errors import NotFound

THREADS = 4
SENT = 50  # more than the default pool has threads
UPLOAD: dict[str, Any] = {"data": {"purpose": "fine-tune"}, "files": {"file": ("set.jsonl", b"{}")}}
JOB: dict[str, Any] = {"json": {"model": "base", "training_file": "file-1"}}


@pytest.mark.parametrize(("path", "body"), [("/v1/files", UPLOAD), ("/v1/fine_tuning/validate", JOB)])
def test_blocked_checks_leave_other_endpoints_their_threads_and_the_surplus_is_refused_at_once(
    path: str, body: dict[str, Any]
) -> None:
    release = threading.Event()

    def blocked(*_: Any) -> None:
        release.wait()
        raise NotFound("released")

    app = FastAPI()
    service = SimpleNamespace(upload=blocked, validate=blocked, list_page=lambda *_, **__: ([], False))
    app.state.services = SimpleNamespace(files=service, jobs=service)
    app.dependency_overrides[auth.owner] = lambda: "owner"
    app.include_router(files.router)
    app.include_router(fine_tuning.router)
    install_error_handlers(app)

    async def beside_blocked_checks() -> tuple[int, list[int]]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            sending = [asyncio.create_task(_status(http.post(path, **body))) for _ in range(SENT)]
            try:
                refused = SENT - THREADS - own_threads.MAX_WAITING
                async with asyncio.timeout(20):
                    while sum(task.done() for task in sending) < refused:
                        await asyncio.sleep(0.01)
                    other = await _status(http.get("/v1/files"))
            finally:
                release.set()
            return other, await asyncio.gather(*sending)

    other, statuses = asyncio.run(beside_blocked_checks())
    assert other == 200
    assert statuses.count(404) == THREADS + own_threads.MAX_WAITING
    assert statuses.count(429) == SENT - THREADS - own_threads.MAX_WAITING


async def _status(answer: Coroutine[Any, Any, httpx.Response]) -> int:
    return (await answer).status_code
