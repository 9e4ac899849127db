"""The blocking and the asynchronous Python client against a running server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from api_data import BASE, chat_lines
from running_server import RunningServer

from reftserve.client import AsyncClient, BadRequest, Client, Conflict, ConnectionFailed, JobEnded, NotFound
from reftserve.client.schemas import ChatMessage, InterventionUse

QUICK = {"layers": [1], "rank": 1, "n_epochs": 1, "batch_size": 8}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Client]:
    with Client(server.url, max_retries=0) as client:
        yield client


def test_without_a_model_the_base_answers(client: Client) -> None:
    assert client.base_model == BASE
    answer = client.generate("the quick", max_tokens=5, temperature=0)
    assert answer.model == BASE
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert client.generate([1, 2, 3], max_tokens=5).usage.prompt_tokens == 3  # type: ignore[union-attr]


def test_a_message_can_be_a_string_a_dict_or_typed(client: Client) -> None:
    given = ["hello", [{"role": "user", "content": "hello"}], [ChatMessage(role="user", content="hello")]]
    answers = {client.chat(messages, max_tokens=6, temperature=0).text for messages in given}  # type: ignore[arg-type]
    assert len(answers) == 1


def test_interventions_are_named_as_model_or_composed(client: Client, trained: str) -> None:
    named = client.chat("say yes 1", model=trained, max_tokens=6, temperature=0).text
    for use in (trained, {"name": "greeter", "version": 1}, InterventionUse(name="greeter")):
        assert client.chat("say yes 1", interventions=[use], max_tokens=6, temperature=0).text == named
    nothing = InterventionUse(name="greeter", scale=0)
    plain = client.chat("say yes 1", max_tokens=6, temperature=0).text
    assert client.chat("say yes 1", interventions=[nothing], max_tokens=6, temperature=0).text == plain


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_a_stream_has_the_text_of_the_whole_answer(client: Client, kind: str) -> None:
    whole = (client.generate if kind == "prompt" else client.chat)("the fox", max_tokens=12, temperature=0)
    arguments = {"prompt": "the fox"} if kind == "prompt" else {"messages": "the fox"}
    with client.stream(**arguments, max_tokens=12, temperature=0) as pieces:  # type: ignore[arg-type]
        assert "".join(pieces) == whole.text == pieces.text
    assert pieces.finish_reason == whole.choices[0].finish_reason
    assert pieces.usage == whole.usage
    with pytest.raises(TypeError, match="either"):
        client.stream("a", messages="b")


def test_a_path_is_uploaded_and_trained_and_the_job_reports_its_progress(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "greetings.jsonl"
    path.write_bytes(chat_lines(24))
    job = client.train(path, name="from-path", seed=1, metadata={"who": "test"}, **QUICK)  # type: ignore[arg-type]
    assert job.wait(timeout_s=120) is job
    assert job.fine_tuned_model == "from-path@1"
    assert job.data.metadata == {"who": "test"}
    events = list(job.events())
    assert events[0].message.startswith("Created")
    assert events[-1].message == "Published from-path@1"
    assert len({event.id for event in events}) == len(events), "each event once"
    steps = [step["step"] for event in events for step in event.steps]
    assert steps == list(range(1, len(steps) + 1)), "in order"
    assert job.checkpoints()[0].step_number == steps[-1]
    assert client.jobs.get(job.id).status == "succeeded"
    assert job.id in [row.id for row in client.jobs.list()]
    uploaded = client.files.get(job.data.training_file)
    assert (uploaded.filename, uploaded.examples) == ("greetings.jsonl", 24)
    again = client.train(job.data.training_file, name="from-id", **QUICK)  # type: ignore[arg-type]
    assert again.data.training_file == job.data.training_file
    again.wait(timeout_s=120)


def test_a_data_set_can_be_inspected_before_training(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "greetings.jsonl"
    path.write_bytes(chat_lines(24))
    jobs = [job.id for job in client.jobs.list()]
    report = client.check_data(path, validation_file=client.files.upload(chat_lines(30)), max_length=200)
    assert (report.training.rows, report.max_length, report.labels) == (24, 200, ["no", "yes"])
    assert report.leaked == 24
    assert "24 of 30 validation examples" in report.warnings[0]
    assert [job.id for job in client.jobs.list()] == jobs
    with pytest.raises(BadRequest, match="at least 10 are needed"):
        client.check_data(client.files.upload(chat_lines(9)))


def test_waiting_for_a_cancelled_job_raises(client: Client) -> None:
    file = client.files.upload(chat_lines(24), filename="bytes.jsonl")
    job = client.train(file, name="never", n_epochs=1000, batch_size=1, layers=[1], rank=1)
    with pytest.raises(TimeoutError, match="goes on"):
        job.wait(timeout_s=0.2)
    job.cancel()
    with pytest.raises(JobEnded, match="cancelled"):
        job.wait(timeout_s=60)
    assert job.status == "cancelled"


def test_a_job_is_paused_resumed_and_retried(client: Client) -> None:
    file = client.files.upload(chat_lines(24), filename="bytes.jsonl")
    job = client.train(file, name="restless", n_epochs=1000, batch_size=1, layers=[1], rank=1)
    job.pause()
    deadline = time.monotonic() + 60
    while job.refresh().status != "paused":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert job.resume().status in ("validating_files", "queued")
    assert job.cancel().retry().status in ("validating_files", "queued")
    job.cancel()
    with pytest.raises(Conflict):
        job.pause()


def test_a_downloaded_intervention_uploads_under_another_name(client: Client, trained: str, tmp_path: Path) -> None:
    folder = client.interventions.download("greeter", tmp_path / "greeter")
    assert sorted(path.name for path in folder.iterdir()) == ["edits.safetensors", "history.json", "manifest.json"]
    copy = client.interventions.upload("copy", folder)
    assert copy.content_hash == client.interventions.version("greeter").content_hash
    assert client.interventions.history("copy").step == client.interventions.history("greeter", 1).step
    (folder / "history.json").unlink()
    second = client.interventions.upload("copy", folder)
    with pytest.raises(NotFound, match="copy@2 holds no training history"):
        client.interventions.history("copy")
    assert second.id == "copy@2"
    assert client.interventions.alias("copy", "stable", 1).aliases == {"latest": 2, "stable": 1}
    assert client.interventions.version("copy", "stable").version == 1
    assert client.chat("say no 2", model="copy@stable", max_tokens=5, temperature=0).text
    assert "stable" not in client.interventions.delete_alias("copy", "stable").aliases
    client.interventions.delete("copy", 2)
    assert client.interventions.get("copy").versions == [1]
    client.interventions.delete("copy", force=True)
    assert "copy" not in [row.name for row in client.interventions.list()]


def test_errors_carry_the_servers_message(client: Client) -> None:
    with pytest.raises(NotFound, match="no-such") as not_found:
        client.chat("hi", model="no-such")
    assert (not_found.value.status, not_found.value.code, not_found.value.param) == (404, "model_not_found", "model")
    with pytest.raises(BadRequest, match="line 2") as bad:
        client.files.upload(b'{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    assert bad.value.param == "file.line.2"
    with pytest.raises(ConnectionFailed):
        Client("http://127.0.0.1:9", max_retries=0).models.list()
    assert not Client("http://127.0.0.1:9").is_ready()


def test_the_asynchronous_client_does_the_same(server: RunningServer, client: Client, trained: str) -> None:
    async def use() -> None:
        async with AsyncClient(server.url) as remote:
            assert await remote.is_ready()
            assert await remote.base_model() == BASE
            answers = await asyncio.gather(*(remote.chat(f"say {i}", max_tokens=5, temperature=0) for i in range(8)))
            assert [answer.text for answer in answers] == [
                client.chat(f"say {i}", max_tokens=5, temperature=0).text for i in range(8)
            ]
            async with await remote.stream("the fox", model=trained, max_tokens=7, temperature=0) as pieces:
                gathered = [piece async for piece in pieces]
            assert "".join(gathered) == client.generate("the fox", model=trained, max_tokens=7, temperature=0).text
            job = await remote.train((await remote.files.upload(chat_lines(24))).id, name="async", **QUICK)  # type: ignore[arg-type]
            messages = [event.message async for event in job.events(timeout_s=120)]
            await job.wait()
            assert messages[-1] == f"Published {job.fine_tuned_model}"
            assert (await remote.interventions.version("async")).job_id == job.id
            for of_an_ended_job in (job.pause, job.resume, job.retry, job.cancel):
                with pytest.raises(Conflict, match=job.id):
                    await of_an_ended_job()
            assert (await remote.interventions.history("async")).step[0] == 1
            assert await remote.check_data(job.data.training_file, **QUICK) == job.data.data_report  # type: ignore[arg-type]
            with pytest.raises(NotFound):
                await remote.files.get("file-none")

    asyncio.run(use())


def test_the_manifest_records_an_interventions_provenance(client: Client, trained: str) -> None:
    version = client.interventions.version("greeter")
    provenance = version.manifest["provenance"]
    assert {"dataset_hash", "hyperparameters", "losses", "scores", "seconds", "seed", "code_version"} <= set(provenance)
    assert set(provenance["scores"]) == {"base", "intervention"}
    assert json.dumps(version.manifest)
    assert version.parameters == version.manifest["parameters"]
