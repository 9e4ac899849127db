"""Chaos: kill server and workers at random moments of jobs; everything acknowledged survives whole."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from api_data import chat_lines
from published import make_artifact
from sqlalchemy import func, select
from victims import Victim, free_port, serve, wait_for_answer, work

from reftserve.client import Client, Job
from reftserve.client.exceptions import Conflict, ConnectionFailed
from reftserve.interventions import load_artifact
from reftserve.server.base.folder import open_base
from reftserve.server.settings import Settings
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import JobEvent

MOMENTS = 20
SEED = 4
CHECKPOINT_STEPS = 5
STEPS = 60
LIVING_JOBS = 3
PAUSE_S = 0.15
MOMENT_S = 0.3  # some steps, a checkpoint, or the gap between two jobs
TIMEOUT_S = 120
RECIPE = {"layers": [1], "rank": 1, "dropout": 0.1, "n_epochs": 12, "batch_size": 4}


@dataclass
class Acknowledged:
    files: dict[str, bytes] = field(default_factory=dict)
    jobs: list[str] = field(default_factory=list)
    interventions: dict[str, str] = field(default_factory=dict)


class Users(threading.Thread):
    """Users that upload, train, pause and resume; they count a request without an answer as not done."""

    def __init__(self, client: Client, training_file: str, artifact: Path) -> None:
        super().__init__(name="users", daemon=True)
        self.acknowledged = Acknowledged()
        self.failure: Exception | None = None
        self._client = client
        self._training_file = training_file
        self._artifact = artifact
        self._gone = threading.Event()

    def run(self) -> None:
        number = 0
        while not self._gone.wait(PAUSE_S):
            number += 1
            try:
                self._act(number)
            except ConnectionFailed:
                continue
            except Exception as cause:
                self.failure = cause
                return

    def leave(self) -> None:
        self._gone.set()
        self.join()

    def _act(self, number: int) -> None:
        if number % 5 == 0:
            self._let_rest_or_go_on()
        elif number % 3 == 0:
            content = chat_lines(10 + number)
            self.acknowledged.files[self._client.files.upload(content).id] = content
        elif number % 3 == 1:
            version = self._client.interventions.upload("uploaded", self._artifact)
            self.acknowledged.interventions[version.id] = version.content_hash
        elif sum(job.finished_at is None for job in self._client.jobs.list(limit=100)) < LIVING_JOBS:
            self.acknowledged.jobs.append(train(self._client, self._training_file, f"trained-{number % 2}"))

    def _let_rest_or_go_on(self) -> None:
        for job in self._client.jobs.list(limit=100):
            # The job may have ended since it was listed.
            with suppress(Conflict):
                if job.status == "paused":
                    self._client.jobs.get(job.id).resume()
                elif job.status == "running":
                    self._client.jobs.get(job.id).pause()


def train(client: Client, training_file: str, name: str) -> str:
    return client.train(training_file, name=name, seed=9, **RECIPE).id  # type: ignore[arg-type]


@pytest.fixture
def settings(tiny_llama_folder: Path, tmp_path: Path) -> Settings:
    return Settings(
        model=str(tiny_llama_folder),
        data=tmp_path / "data",
        port=free_port(),
        worker=False,
        checkpoint_steps=CHECKPOINT_STEPS,
        lease_s=1,
        cpu_kernels="never",
        engine_threads=1,
        worker_threads=1,
    )


@contextmanager
def running(settings: Settings, logs: Path) -> Iterator[list[Victim]]:
    victims = [Victim(serve, settings, logs / "server.log")]
    victims += [Victim(work, settings, logs / f"worker-{number}.log") for number in range(2)]
    try:
        yield victims
    finally:
        for victim in victims:
            victim.stop()


def wait_for_steps(database: Database, count: int) -> None:
    query = select(func.count()).where(JobEvent.type == "metrics")

    def done() -> int:
        with database.reading() as session:
            return session.scalar(query) or 0

    deadline, before = time.monotonic() + TIMEOUT_S, done()
    while done() < before + count:
        assert time.monotonic() < deadline, "no job goes on"
        time.sleep(0.01)


def test_everything_acknowledged_is_whole_after_kills_at_random_moments(settings: Settings, tmp_path: Path) -> None:
    draw = random.Random(SEED)  # noqa: S311 - moments, not a secret
    url = f"http://127.0.0.1:{settings.port}"
    artifact = make_artifact(tmp_path / "artifact", base=open_base(settings).fingerprint)
    with running(settings, tmp_path) as (server, *workers), Client(url, max_retries=0) as client:
        wait_for_answer(url)
        users = Users(client, client.files.upload(chat_lines(24)).id, artifact)
        users.start()
        database = Database(settings.resolved_database_url)
        for _ in range(MOMENTS):
            wait_for_steps(database, draw.randint(1, STEPS // 2))
            time.sleep(draw.uniform(0, MOMENT_S))
            going = draw.choice([[server], [workers[0]], [workers[1]], workers, [server, *workers]])
            for victim in going:
                victim.kill()
            for victim in going:
                victim.restart()
        users.leave()
        assert users.failure is None
        wait_for_answer(url)
        assert_whole(client, users.acknowledged, tmp_path)


def assert_whole(client: Client, acknowledged: Acknowledged, scratch: Path) -> None:
    """Check every file, job and intervention; each job has published once, with the result of an undisturbed job."""
    assert all(map(len, (acknowledged.files, acknowledged.jobs, acknowledged.interventions))), "the users got through"
    for file_id, content in acknowledged.files.items():
        assert client.files.content(file_id) == content
    for reference, content_hash in acknowledged.interventions.items():
        name, version = reference.split("@")
        folder = client.interventions.download(name, scratch / reference, version=version)
        assert load_artifact(folder).content_hash == content_hash
    jobs = [client.jobs.get(job.id) for job in client.jobs.list(limit=1000)]
    assert set(acknowledged.jobs) <= {job.id for job in jobs}
    undisturbed = client.jobs.get(train(client, jobs[0].data.training_file, "undisturbed")).wait(timeout_s=TIMEOUT_S)
    expected = client.interventions.version("undisturbed").content_hash
    for job in jobs:
        with suppress(Conflict):
            job.resume()
        job.wait(timeout_s=TIMEOUT_S)
        name, version = str(job.fine_tuned_model).split("@")
        folder = client.interventions.download(name, scratch / job.id, version=version)
        assert load_artifact(folder).content_hash == expected
        assert_went_on_from_checkpoints(job)
        assert len(client.files.content(job.data.result_files[0]).splitlines()) == 1 + STEPS
    rested = [job for job in jobs if any("was paused" in event.message for event in job.events())]
    assert rested, "some jobs did rest"
    assert any("Resumed from" in event.message for job in jobs for event in job.events()), "kills did hit runs"
    published = [v for i in client.interventions.list() if i.name.startswith("trained") for v in i.versions]
    assert len(published) == len(jobs) == len({job.fine_tuned_model for job in jobs}), "each job, once"
    assert undisturbed.status == "succeeded"


def assert_went_on_from_checkpoints(job: Job) -> None:
    """Check that no event is missing, and that only steps since the last checkpoint were repeated."""
    events = list(job.events())
    assert [int(event.id.rsplit("-", 1)[1]) for event in events] == list(range(1, len(events) + 1))
    steps = [event.data["step"] for event in events if event.data and "step" in event.data]
    saved = {checkpoint.step_number for checkpoint in job.checkpoints()}
    assert (steps[0], steps[-1]) == (1, STEPS)
    for before, after in pairwise(steps):
        again = after - 1 in saved | {0} and 0 <= before - after < CHECKPOINT_STEPS
        assert after == before + 1 or again, f"from step {before} to {after}"
