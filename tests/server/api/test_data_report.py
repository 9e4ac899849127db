"""Data sets in any format through the API: a report describes them before a job is queued."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import httpx
import openai
import pyarrow as pa
import pytest
from api_data import BASE, chat_lines, finished
from pyarrow import parquet

ROWS = [{"instruction": "yes or no?", "input": f"number {i}", "output": "yes" if i % 2 else "no"} for i in range(24)]


def as_csv() -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ROWS[0])
    writer.writeheader()
    writer.writerows(ROWS)
    return buffer.getvalue().encode()


def as_parquet() -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


def upload(http: httpx.Client, filename: str, content: bytes) -> str:
    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (filename, content)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["examples"] == 24
    file_id: str = answer.json()["id"]
    return file_id


def validate(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/fine_tuning/validate", json={"model": BASE, **fields})


def test_every_format_gives_the_same_report(http: httpx.Client) -> None:
    files = {
        "set.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
        "set.json": json.dumps(ROWS).encode(),
        "set.csv": as_csv(),
        "set.parquet": as_parquet(),
    }
    reports = [validate(http, training_file=upload(http, *file)).json() for file in files.items()]
    assert reports[0]["training"]["rows"] == 24
    assert reports[0]["labels"] == ["no", "yes"]
    assert reports[0]["splits"] == {"train": 20, "validation": 2, "test": 2}
    assert all(report == reports[0] for report in reports)


def test_a_job_on_a_parquet_file_has_a_report_and_trains_on_the_reported_examples(
    http: httpx.Client, client: openai.OpenAI
) -> None:
    file = upload(http, "set.parquet", as_parquet())
    method = {"type": "reft", "reft": {"layers": [2], "rank": 1, "hyperparameters": {"n_epochs": 1}}}
    body = {"training_file": file, "method": method, "suffix": "tabular", "seed": 5}
    promised = validate(http, **body).json()
    job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, **body}).json()
    assert (job["status"], job["data_report"], job["hyperparameters"]["n_epochs"]) == ("validating_files", None, "auto")
    done = finished(client, job["id"])
    assert done.status == "succeeded", done.error
    job = http.get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert job["data_report"] == promised
    assert [job["plan"][name] for name in ("layers", "positions", "rank")] == [[2], "l1", 1], (
        "decided by user and recipe"
    )
    manifest = http.get("/v1/interventions/tabular/versions/1").json()["manifest"]
    assert manifest["provenance"]["examples"] == promised["splits"]


def test_validating_queues_nothing(http: httpx.Client) -> None:
    before = http.get("/v1/fine_tuning/jobs?limit=1000").json()["data"]
    file = upload(http, "set.jsonl", chat_lines(24))
    assert validate(http, training_file=file, suffix="never").status_code == 200
    assert http.get("/v1/fine_tuning/jobs?limit=1000").json()["data"] == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"method": {"type": "reft", "reft": {"hyperparameters": {"max_length": 2}}}}, "training_file"),
        ({"validation_file": "the same"}, "validation_file"),
    ],
)
def test_a_job_fails_with_the_error_that_validating_its_data_gives(
    http: httpx.Client, client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    file = upload(http, "set.jsonl", chat_lines(24))
    body = {"training_file": file, **{name: file if value == "the same" else value for name, value in fields.items()}}
    refused = validate(http, **body)
    assert refused.status_code == 400
    expected = refused.json()["error"]
    assert expected["param"] == param
    job = http.post("/v1/fine_tuning/jobs", json={"model": BASE, **body}).json()
    done = finished(client, job["id"])
    assert done.status == "failed"
    assert done.error is not None
    assert done.error.model_dump() == {name: expected[name] for name in ("code", "message", "param")}


@pytest.mark.parametrize("path", ["validate", "jobs"])
@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"suffix": "not a name"}, 400, "suffix"),
        ({"training_file": "file-x"}, 404, "training_file"),
        ({"colour": 1}, 400, "colour"),
    ],
)
def test_validation_and_job_creation_refuse_the_same_requests(
    http: httpx.Client, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    file = upload(http, "set.jsonl", chat_lines(24))
    fields = {name: file if value == "the same" else value for name, value in fields.items()}
    answer = http.post(f"/v1/fine_tuning/{path}", json={"model": BASE, "training_file": file, **fields})
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_damaged_parquet_file_is_a_clear_400(http: httpx.Client) -> None:
    broken = as_parquet()[:-20]
    answer = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("set.parquet", broken)})
    assert answer.status_code == 400
    assert "cannot be read as Parquet" in answer.json()["error"]["message"]
