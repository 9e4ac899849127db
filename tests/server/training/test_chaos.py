"""Chaos: kill server and workers at random moments of jobs; everything acknowledged survives whole."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import pytest
from api_data import chat_lines
from published import make_artifact
from sqlalchemy import func, select
from users import Acknowledged, Users, train
from victims import Victim, free_port, serve, wait_for_answer, work

from reftserve.client import Client, Job
from reftserve.client.exceptions import Conflict
from reftserve.interventions import load_artifact
from reftserve.server.base.folder import open_base
from reftserve.server.settings import Settings
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import JobCheckpoint

MOMENTS = 20
SEED = 4
CHECKPOINT_STEPS = 5
STEPS = 60
MOMENT_S = 0.3  # some steps, a checkpoint, or the gap between two jobs
TIMEOUT_S = 120


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


def wait_for_checkpoints(database: Database, count: int) -> None:
    query = select(func.count()).select_from(JobCheckpoint)

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
            wait_for_checkpoints(database, draw.randint(1, STEPS // 2 // CHECKPOINT_STEPS))
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
    steps = [step["step"] for event in events for step in event.steps]
    saved = {checkpoint.step_number for checkpoint in job.checkpoints()}
    assert (steps[0], steps[-1]) == (1, STEPS)
    for before, after in pairwise(steps):
        again = after - 1 in saved | {0} and 0 <= before - after < CHECKPOINT_STEPS
        assert after == before + 1 or again, f"from step {before} to {after}"
