"""A job's events reach the clients once and in order, also across failures of the server."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from api_data import chat_lines
from httpx_sse import ServerSentEvent
from jobs_api import JobsApi, jobs_api, step
from running_server import RunningServer

from reftserve.client import AsyncClient, Client, ConnectionFailed, JobEnded, StreamFailed, retries
from reftserve.client.event_reader import EventReader
from reftserve.client.schemas import FineTuningEvent

Watch = Callable[[str, str, Callable[[FineTuningEvent], None]], str]


@pytest.fixture
def api(tiny_llama_folder: Path, tmp_path: Path) -> Iterator[JobsApi]:
    with jobs_api(tiny_llama_folder, tmp_path) as api:
        yield api


def blocking(url: str, job_id: str, seen: Callable[[FineTuningEvent], None]) -> str:
    with Client(url, max_retries=0) as client:
        job = client.jobs.get(job_id)
        for event in job.events(timeout_s=60):
            seen(event)
        return job.status


def asynchronous(url: str, job_id: str, seen: Callable[[FineTuningEvent], None]) -> str:
    async def watch() -> str:
        async with AsyncClient(url, max_retries=0) as client:
            job = await client.jobs.get(job_id)
            async for event in job.events(timeout_s=60):
                await asyncio.to_thread(seen, event)
            return job.status

    return asyncio.run(watch())


@pytest.mark.parametrize("watch", [blocking, asynchronous])
def test_events_resume_after_a_server_restart(api: JobsApi, watch: Watch) -> None:
    job_id = api.add_job()
    api.add_events(job_id, *(step(number) for number in range(1, 4)))
    steps: list[int] = []

    def seen(event: FineTuningEvent) -> None:
        if event.data is None:
            return
        steps.append(event.data["step"])
        if steps[-1] in (3, 5):
            api.stop()
            api.add_events(job_id, step(steps[-1] + 1), step(steps[-1] + 2))
            threading.Timer(0.5, api.start).start()
        elif steps[-1] == 7:
            api.add_events(job_id, "Published", status="succeeded")

    assert watch(api.url, job_id, seen) == "succeeded"
    assert steps == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_time_limit_ends_the_watching_not_the_job(api: JobsApi, *, is_busy: bool) -> None:
    job_id = api.add_job()

    def watch() -> None:
        with Client(api.url) as client:
            for _ in client.jobs.get(job_id).events(timeout_s=0.6):
                if is_busy:
                    api.add_events(job_id, step(1))

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"{job_id} has not ended after 0\.6 seconds; it goes on"):
        watch()
    assert time.monotonic() - began > 0.5


def test_a_server_that_stops_counts_as_a_broken_connection() -> None:
    reader = EventReader("ftjob-1", None)
    error = {"message": "m", "type": "server_error", "param": None, "code": "server_stopping"}
    with pytest.raises(httpx.TransportError):
        reader.take(ServerSentEvent(data=json.dumps({"error": error})))
    with pytest.raises(StreamFailed):
        reader.take(ServerSentEvent(data=json.dumps({"error": {**error, "code": "internal_error"}})))


def test_watching_fails_if_the_server_stays_down(api: JobsApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RECONNECT_S", 0.5)
    with Client(api.url) as client:
        events = client.jobs.get(api.add_job()).events()
        next(events)
        api.stop()
        with pytest.raises(ConnectionFailed):
            next(events)
    api.start()


def test_waiting_shows_losses_speed_and_remaining_time_and_raises_on_failure(
    api: JobsApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    job_id = api.add_job()
    api.add_events(job_id, step(1), step(2, valid_loss=0.7, valid_exact_match=0.25), step(3))
    api.add_events(job_id, "The job failed: no room", status="failed")
    with Client(api.url) as client, pytest.raises(JobEnded, match="failed"):
        client.jobs.get(job_id).wait(progress=True)
    shown = capsys.readouterr().err
    assert "3/10" in shown
    assert "loss 0.3333, held-out loss 0.7, 1,234 tokens/s, 0:00:07 to go" in shown


def free_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return str(taken.getsockname()[1])


def test_the_events_of_a_training_job_survive_kill_9_of_its_server(tiny_llama_folder: Path, tmp_path: Path) -> None:
    flags = ("--port", free_port())
    server = first = RunningServer(tiny_llama_folder, tmp_path, *flags).wait_until_ready()
    try:
        with Client(server.url) as client:
            file = client.files.upload(chat_lines(24))
            job = client.train(file, name="watched", layers=[1], rank=1, n_epochs=100, batch_size=4)
            events = []
            for event in job.events(timeout_s=100):
                events.append(event)
                if server is first and any(step["step"] >= 15 for step in event.steps):
                    server.kill()
                    server = RunningServer(tiny_llama_folder, tmp_path, *flags)
            assert job.fine_tuned_model == "watched@1"
            assert [int(event.id.rsplit("-", 1)[1]) for event in events] == list(range(1, len(events) + 1))
            assert events[-1].message == "Published watched@1"
            assert any(event.message.startswith("Resumed") for event in events)
            history = client.interventions.history("watched")
            by_step = {step["step"]: step for event in events for step in event.steps}
            assert history.step == list(by_step) == list(range(1, by_step[1]["total_steps"] + 1))
            assert history.train_loss == pytest.approx([by_step[i]["train_loss"] for i in history.step], rel=1e-5)
            held_out = {
                i: loss for i, loss in zip(history.step, history.valid["loss"], strict=True) if loss is not None
            }
            expected = {i: data["valid_loss"] for i, data in by_step.items() if "valid_loss" in data}
            assert held_out == pytest.approx(expected, rel=1e-5)
            assert "exact_match" in history.valid
    finally:
        if server.process.poll() is None:
            server.stop()
