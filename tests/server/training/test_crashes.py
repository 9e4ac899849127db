"""Acknowledged work survives kill -9: a job resumes from its last checkpoint and has the same result."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import openai
from api_data import BASE, chat_lines, finished
from running_server import RunningServer, running_server

from reftserve.client.schemas import FineTuningEvent

REFT = {"layers": [1], "rank": 2, "dropout": 0.1, "hyperparameters": {"n_epochs": 60, "batch_size": 4}}
STEPS = 60 * 5
CHECKPOINT_STEPS = 50
ENVIRONMENT = {"REFTSERVE_CHECKPOINT_STEPS": str(CHECKPOINT_STEPS), "REFTSERVE_LEASE_S": "2"}


def openai_client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")


def create_job(client: openai.OpenAI, name: str) -> str:
    file = client.files.create(file=("set.jsonl", chat_lines(24)), purpose="fine-tune")
    method = {"type": "reft", "reft": REFT}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix=name, seed=5, method=method)  # type: ignore[arg-type]
    return job.id


def wait_until_between_checkpoints(client: openai.OpenAI, job_id: str) -> None:
    deadline = time.monotonic() + 60
    while max(steps(client, job_id), default=0) < CHECKPOINT_STEPS + 3:
        assert time.monotonic() < deadline, client.fine_tuning.jobs.list_events(job_id).data
        time.sleep(0.02)


def steps(client: openai.OpenAI, job_id: str) -> list[int]:
    events = reversed(list(client.fine_tuning.jobs.list_events(job_id, limit=1000)))
    return [step["step"] for event in events for step in FineTuningEvent.model_validate(event.model_dump()).steps]


def content_hash(server: RunningServer, reference: str) -> str:
    name, version = reference.split("@")
    return str(httpx.get(f"{server.url}/v1/interventions/{name}/versions/{version}").json()["content_hash"])


def assert_resumed(client: openai.OpenAI, job_id: str) -> None:
    done = steps(client, job_id)
    resumed = [index for index in range(1, len(done)) if done[index] <= done[index - 1]]
    assert done[0] == 1
    assert done[-1] == STEPS
    assert resumed, "the kill came while it trained"
    assert all(done[index] > 1 and done[index] % CHECKPOINT_STEPS == 1 for index in resumed), "right after a checkpoint"
    assert len(done) < STEPS + CHECKPOINT_STEPS * len(resumed) + 1


def test_a_job_survives_kill_9_of_the_worker_and_of_the_server(tiny_llama_folder: Path, tmp_path: Path) -> None:
    with running_server(tiny_llama_folder, tmp_path, env=ENVIRONMENT) as first:
        client = openai_client(first)
        undisturbed = finished(client, create_job(client, "undisturbed"))
        disturbed = create_job(client, "disturbed")
        wait_until_between_checkpoints(client, disturbed)
        first.child("training.worker").kill()
        job = finished(client, disturbed)
        assert job.status == "succeeded", job.error
        assert_resumed(client, disturbed)
        orphaned = create_job(client, "orphaned")
        wait_until_between_checkpoints(client, orphaned)
        first.kill()
    with running_server(tiny_llama_folder, tmp_path, env=ENVIRONMENT) as second:
        client = openai_client(second)
        job = finished(client, orphaned)
        assert job.status == "succeeded", job.error
        assert_resumed(client, orphaned)
        expected = content_hash(second, undisturbed.fine_tuned_model or "")
        assert content_hash(second, "disturbed@1") == content_hash(second, "orphaned@1") == expected
        assert len(client.files.list(purpose="fine-tune").data) == 3
