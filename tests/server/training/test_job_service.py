"""Jobs through the API: OpenAI's contract beyond a single run."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest
from api_data import BASE, chat_lines, finished
from running_server import RunningServer


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any")


def create(client: openai.OpenAI, name: str, **fields: object) -> str:
    file = client.files.create(file=("set.jsonl", chat_lines(24)), purpose="fine-tune")
    reft = {"layers": [2], "rank": 1, "hyperparameters": {"n_epochs": 1}}
    arguments = {"method": {"type": "reft", "reft": reft}, **fields}
    return client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix=name, **arguments).id  # type: ignore[arg-type]


def test_two_jobs_with_one_name_publish_two_versions(client: openai.OpenAI) -> None:
    jobs = [create(client, "shared", seed=seed) for seed in (1, 2)]
    done = [finished(client, job) for job in jobs]
    assert [job.status for job in done] == ["succeeded", "succeeded"]
    assert sorted(job.fine_tuned_model or "" for job in done) == ["shared@1", "shared@2"]


def test_the_supervised_method_uses_the_recipe(client: openai.OpenAI) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    job = finished(client, create(client, "recipe", method=method))
    assert job.status == "succeeded"
    assert job.hyperparameters.n_epochs == 2  # type: ignore[union-attr]


def trials(client: openai.OpenAI, server: RunningServer, name: str, method: object) -> list[dict[str, Any]]:
    file = client.files.create(file=("set.jsonl", chat_lines(24)), purpose="fine-tune")
    fields = {} if method is None else {"method": method}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=file.id, suffix=name, **fields)  # type: ignore[arg-type]
    assert finished(client, job.id).status == "succeeded"
    manifest = httpx.get(f"{server.url}/v1/interventions/{name}/versions/1").json()["manifest"]
    table: list[dict[str, Any]] = manifest["provenance"]["sweep"]
    assert (manifest["layers"], manifest["positions"]) == (table[0]["layers"], table[0]["positions"])
    return table


def test_a_job_without_a_method_tries_candidates_and_publishes_the_best(
    client: openai.OpenAI, server: RunningServer
) -> None:
    tried = trials(client, server, "automatic", None)
    assert len(tried) > 2
    assert tried[0]["steps"] == max(trial["steps"] for trial in tried)


def test_auto_hyperparameters_keep_the_fields_that_are_given(client: openai.OpenAI, server: RunningServer) -> None:
    method = {"type": "reft", "reft": {"layers": [1, 2], "rank": 3, "hyperparameters": "auto"}}
    tried = trials(client, server, "half-automatic", method)
    assert len(tried) > 1
    assert {(tuple(trial["layers"]), trial["rank"]) for trial in tried} == {((1, 2), 3)}


def test_a_job_whose_file_was_deleted_fails_with_a_reason(client: openai.OpenAI) -> None:
    blocking = create(client, "blocking", method={"type": "reft", "reft": {"hyperparameters": {"n_epochs": 40}}})
    waiting = create(client, "waiting")
    client.files.delete(client.fine_tuning.jobs.retrieve(waiting).training_file)
    client.fine_tuning.jobs.cancel(blocking)
    job = finished(client, waiting)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.param == "training_file"
    assert "file-" in job.error.message
    assert finished(client, blocking).status == "cancelled"


def test_a_queued_job_can_be_cancelled_and_an_ended_one_cannot(client: openai.OpenAI) -> None:
    running = create(client, "running", method={"type": "reft", "reft": {"hyperparameters": {"n_epochs": 40}}})
    queued = create(client, "queued")
    assert client.fine_tuning.jobs.cancel(queued).status == "cancelled"
    client.fine_tuning.jobs.cancel(running)
    assert finished(client, running).status == "cancelled"
    with pytest.raises(openai.ConflictError):
        client.fine_tuning.jobs.cancel(running)


def test_a_running_job_is_paused_resumed_cancelled_and_retried(client: openai.OpenAI, server: RunningServer) -> None:
    reft = {"layers": [2], "rank": 1, "hyperparameters": {"n_epochs": 40}}
    job_id = create(client, "restless", method={"type": "reft", "reft": reft})
    wait_for(client, job_id, "running")
    client.fine_tuning.jobs.pause(job_id)
    wait_for(client, job_id, "paused")
    following = finished(client, create(client, "following"))
    assert following.status == "succeeded", "the worker is free for others"
    assert client.fine_tuning.jobs.resume(job_id).status in ("queued", "validating_files")
    wait_for(client, job_id, "running")
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    retried = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{job_id}/retry").json()
    assert (retried["status"], retried["error"], retried["finished_at"]) == ("queued", None, None)
    assert finished(client, job_id).fine_tuned_model == "restless@1"
    for verb in ("pause", "resume", "retry"):
        refused = httpx.post(f"{server.url}/v1/fine_tuning/jobs/{job_id}/{verb}")
        assert (refused.status_code, refused.json()["error"]["code"]) in [(409, "job_ended"), (409, "job_not_failed")]


def wait_for(client: openai.OpenAI, job_id: str, status: str) -> None:
    deadline = time.monotonic() + 60
    while client.fine_tuning.jobs.retrieve(job_id).status != status:
        assert time.monotonic() < deadline, client.fine_tuning.jobs.retrieve(job_id)
        time.sleep(0.05)
