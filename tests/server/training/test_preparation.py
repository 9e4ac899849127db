"""The first durable step of a job checks and encodes its files; later runs, on any worker, read what it made."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from api_data import chat_lines
from interruptions import kill_at_step
from workspace import EXAMPLES, OWNER, Workspace

from reftserve.client.schemas import FineTuningJobCreate
from reftserve.server.datasets import EncodedExample, SourceLocation
from reftserve.server.errors import InvalidRequest, Overloaded
from reftserve.server.training import data_check, job_data
from reftserve.server.training.data_check import DataCheck
from reftserve.server.training.encoded_file import read_encoded, write_encoded
from reftserve.server.training.preparation import prepare


def request(workspace: Workspace, content: bytes, **fields: Any) -> FineTuningJobCreate:
    file = workspace.store.files.upload(OWNER, "set.jsonl", "fine-tune", io.BytesIO(content))
    body = {"model": workspace.base.name, "training_file": file.id, "suffix": "tone", **fields}
    return FineTuningJobCreate.model_validate(body)


def prepared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the preparations from now on."""
    calls: list[int] = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return prepare(*arguments, **named)

    monkeypatch.setattr(job_data, "prepare", counted)
    return calls


def test_a_new_job_waits_to_have_its_files_checked(workspace: Workspace) -> None:
    job = workspace.job(workspace.create())
    assert (job.status, job.plan, job.data_report, job.data) == ("validating_files", {}, None, None)
    workspace.worker().work()
    job = workspace.job(job.id)
    assert (job.status, job.plan["n_epochs"]) == ("succeeded", 2)
    assert (job.data_report or {})["training"]["examples"] == EXAMPLES


@pytest.mark.parametrize(
    ("content", "method", "code", "says"),
    [
        (chat_lines(3), None, "too_few_examples", "3 training examples; at least 10"),
        (chat_lines(12), {"max_length": 2}, "too_few_examples", "max_length, 2 tokens"),
        (chat_lines(12).replace(b'"user"', b'"system"', 1), None, "invalid_data", "line 1"),
    ],
)
def test_a_job_whose_data_cannot_be_learned_fails_and_names_the_file(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, content: bytes, method: Any, code: str, says: str
) -> None:
    def refuses(tokenizer: Any, example: Any) -> Any:
        if code == "invalid_data":
            raise InvalidRequest("the chat template refuses these messages", code=code)
        return encode(tokenizer, example)

    from reftserve.server.datasets import report

    encode = report.encode
    monkeypatch.setattr(report, "encode", refuses)
    fields = {} if method is None else {"method": {"type": "reft", "reft": {"hyperparameters": method}}}
    asked = request(workspace, content, **fields)
    with pytest.raises(InvalidRequest, match=says) as refused:
        workspace.jobs.validate(OWNER, asked)
    job_id = workspace.jobs.create(OWNER, asked).id
    workspace.worker().work()
    job = workspace.job(job_id)
    assert job.status == "failed"
    assert job.error == {"code": code, "message": refused.value.message, "param": "training_file"}
    assert workspace.messages(job_id)[-1] == f"The job failed: {refused.value.message}"


def test_a_resumed_job_reads_its_encoded_data_and_prepares_nothing_again(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expiring.create("undisturbed")
    expiring.worker("a").work()
    job_id = expiring.create("disturbed")
    calls = prepared(monkeypatch)
    kill_at_step(expiring.worker("a"), monkeypatch, step=6)
    expiring.store.files.delete(OWNER, expiring.job(job_id).training_file)
    expiring.worker("b").work()
    assert expiring.job(job_id).status == "succeeded"
    assert len(calls) == 1
    assert expiring.content_hash("disturbed") == expiring.content_hash("undisturbed")


@pytest.mark.parametrize("damage", ["flipped", "removed"])
def test_damaged_encoded_data_is_made_again_from_the_upload(
    expiring: Workspace, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    expiring.create("undisturbed")
    expiring.worker("a").work()
    job_id = expiring.create("disturbed")
    kill_at_step(expiring.worker("a"), monkeypatch, step=6)
    (file,) = (expiring.settings.data / "blobs" / "jobs" / job_id).glob("data-*/training.safetensors")
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    calls = prepared(monkeypatch)
    expiring.worker("b").work()
    assert len(calls) == 1
    assert any("it is made again" in message for message in expiring.messages(job_id))
    assert expiring.job(job_id).status == "succeeded"
    assert expiring.content_hash("disturbed") == expiring.content_hash("undisturbed")


def test_encoded_examples_are_read_as_they_were_written(tmp_path: Path) -> None:
    examples = [
        EncodedExample((1, 2, 3), (4,), SourceLocation("line", 7)),
        EncodedExample((), (5, 299), SourceLocation("line", 7)),
        EncodedExample((2**31 - 1,), (0, 1), SourceLocation("line", 2**40)),
    ]
    write_encoded(tmp_path / "set.safetensors", examples)
    assert read_encoded(tmp_path / "set.safetensors") == examples


def long_lines(count: int) -> bytes:
    rows = [json.loads(line) for line in chat_lines(count).splitlines()]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] += f" {number} " + "x" * 60
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture
def files(workspace: Workspace, tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "training"
    path.write_bytes(long_lines(200))
    assert path.stat().st_size > data_check.SMALL_BYTES
    return {"training": path}


def test_data_checked_in_a_process_has_the_same_report_and_errors(
    workspace: Workspace, files: dict[str, Path], tmp_path: Path
) -> None:
    check = DataCheck(workspace.settings, workspace.base)
    assert check.report(None, files, seed=3) == prepare(workspace.base, None, files, seed=3).report
    (tmp_path / "validation").write_bytes(files["training"].read_bytes())
    with pytest.raises(InvalidRequest) as refused:
        check.report(None, {**files, "validation": tmp_path / "validation"}, seed=0)
    assert (refused.value.param, refused.value.code) == ("validation_file", "too_few_examples")


@pytest.mark.parametrize(("limit", "value"), [("MEMORY_BYTES", 1 << 20), ("TIME_S", 0)])
def test_a_check_beyond_its_limits_is_refused_with_advice(
    workspace: Workspace, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(data_check, limit, value)
    files["training"].write_bytes(long_lines(4000))  # more than the process has left in its heap
    with pytest.raises(InvalidRequest, match="create the job, which checks its data in the background") as refused:
        DataCheck(workspace.settings, workspace.base).report(None, files, seed=0)
    assert refused.value.code == "data_too_large"


def test_checks_beyond_those_at_once_are_refused_after_a_wait(
    workspace: Workspace, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_check, "MAX_CHECKS", 0)
    monkeypatch.setattr(data_check, "WAIT_S", 0.01)
    with pytest.raises(Overloaded):
        DataCheck(workspace.settings, workspace.base).report(None, files, seed=0)
