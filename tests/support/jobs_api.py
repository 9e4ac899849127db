"""The API's job endpoints in this process, without engine or worker; a test writes events in the worker's place."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import sqlalchemy
import uvicorn
from api_data import chat_lines
from fastapi import FastAPI, Request

from reftserve.client.schemas import FineTuningJobCreate
from reftserve.server.api import auth, fine_tuning
from reftserve.server.api.error_responses import install_error_handlers
from reftserve.server.base.folder import open_base
from reftserve.server.registry.store import open_store
from reftserve.server.settings import Settings
from reftserve.server.storage.tables import Job, JobEvent
from reftserve.server.training.data_check import DataCheck
from reftserve.server.training.job_service import JobService


class JobsApi:
    """The API on a port that stays the same after a restart. reads: the number of queries for events."""

    def __init__(self, model_folder: Path, data: Path) -> None:
        self._settings = Settings(model=str(model_folder), data=data)
        self._base = open_base(self._settings)
        self._store = open_store(self._settings, self._base.fingerprint)
        self.database = self._store.database
        self.reads = 0
        sqlalchemy.event.listen(self.database.reader, "before_cursor_execute", self._count)
        self._port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        app = FastAPI()
        app.state.services = SimpleNamespace(
            jobs=JobService(self._store, self._base, DataCheck(self._settings, self._base))
        )
        app.dependency_overrides[auth.owner] = _owner
        app.include_router(fine_tuning.router)
        install_error_handlers(app)
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()

    def add_job(self, owner: str = auth.DEFAULT_OWNER) -> str:
        file = self._store.files.upload(owner, "set.jsonl", "fine-tune", io.BytesIO(chat_lines(24)))
        request = FineTuningJobCreate(model=self._base.name, training_file=file.id, suffix="tone")
        return self._jobs().create(owner, request).id

    def add_events(self, job_id: str, *events: str | Mapping[str, Any], status: str | None = None) -> None:
        """Write events (a text is a message, a mapping is metrics) and the status in one transaction."""
        newest = sqlalchemy.select(sqlalchemy.func.max(JobEvent.number)).where(JobEvent.job_id == job_id)
        with self.database.session() as session:
            job = session.get_one(Job, job_id)
            job.status = status or job.status
            for number, event in enumerate(events, start=session.scalars(newest).one() + 1):
                is_message = isinstance(event, str)
                session.add(
                    JobEvent(
                        job_id=job_id,
                        number=number,
                        owner=job.owner,
                        level="info",
                        type="message" if is_message else "metrics",
                        message=event if is_message else f"Step {event['step']}",
                        data=None if is_message else dict(event),
                        created_at=int(time.time()),
                    )
                )

    def _jobs(self) -> JobService:
        return JobService(self._store, self._base, DataCheck(self._settings, self._base))

    def _count(self, connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        self.reads += "FROM job_events" in statement and "max(" not in statement


def _owner(request: Request) -> str:
    return request.headers.get("X-Owner", auth.DEFAULT_OWNER)


def step(number: int, total: int = 10, **scores: float | None) -> dict[str, Any]:
    pace = {"learning_rate": 0.004, "tokens_per_second": 1234.5, "eta_s": float(total - number)}
    return {"step": number, "total_steps": total, "train_loss": 1 / number, **pace, **scores}


@contextmanager
def jobs_api(model_folder: Path, data: Path) -> Iterator[JobsApi]:
    api = JobsApi(model_folder, data)
    try:
        yield api
    finally:
        api.stop()
        api.database.close()
