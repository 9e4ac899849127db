"""Lists over HTTP: OpenAI's client walks through pages of files; native lists have `after`, `limit`, `order`."""

from __future__ import annotations

from pathlib import Path

import httpx
import openai
import pytest
from api_data import BASE, chat_lines
from published import make_artifact
from running_server import RunningServer

from reftserve.client import Client
from reftserve.interventions import fingerprint, pack


def ids(http: httpx.Client, path: str, key: str = "id", **params: object) -> list[str]:
    """Return the ids of all pages of two."""
    found: list[str] = []
    page = {"has_more": True, "last_id": None}
    while page["has_more"]:
        after = {} if page["last_id"] is None else {"after": page["last_id"]}
        page = http.get(path, params={"limit": 2, **after, **params}).raise_for_status().json()  # type: ignore[dict-item]
        assert page["last_id"] or not page["data"]
        found += [row[key] for row in page["data"]]  # type: ignore[index]
    return found


@pytest.fixture
def named(http: httpx.Client, tiny_llama_folder: Path, tmp_path: Path) -> str:
    data = pack(make_artifact(tmp_path / "artifact", base=fingerprint(tiny_llama_folder)))
    for name in ("page-a", "page-b", "page-c", "page-c", "page-c"):
        http.post("/v1/interventions", data={"name": name}, files={"file": ("a.zip", data)}).raise_for_status()
    return "page-c"


def test_openais_client_walks_through_pages_of_files(client: openai.OpenAI, http: httpx.Client) -> None:
    made = [client.files.create(file=(f"{n}.jsonl", chat_lines(2)), purpose="fine-tune").id for n in range(5)]
    walked = [file.id for file in client.files.list(limit=2)]
    assert len(walked) == len(set(walked))
    assert set(made) <= set(walked)
    assert ids(http, "/v1/files", order="asc") == walked[::-1]
    assert [row["id"] for row in http.get("/v1/files").json()["data"]] == walked
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}):
        assert http.get("/v1/files", params=wrong).status_code == 400
    assert http.get("/v1/files", params={"after": "file-none"}).status_code == 404


def test_interventions_versions_and_models_have_pages(server: RunningServer, http: httpx.Client, named: str) -> None:
    names = ids(http, "/v1/interventions", "name")
    assert names == sorted(names)
    assert ids(http, "/v1/interventions", "name", order="desc") == names[::-1]
    versions = ids(http, f"/v1/interventions/{named}/versions")
    assert versions[:3] == sorted(versions, reverse=True)[:3]
    assert ids(http, f"/v1/interventions/{named}/versions", order="asc") == versions[::-1]
    assert http.get(f"/v1/interventions/{named}/versions", params={"after": "latest"}).status_code == 400
    assert ids(http, "/v1/models") == [BASE, *names]
    everything = http.get("/v1/models").json()
    assert ([row["id"] for row in everything["data"]], everything["has_more"]) == ([BASE, *names], False)
    with Client(server.url) as own:
        assert [row.name for row in own.interventions.list()] == names
        assert [version.id for version in own.interventions.versions(named)] == versions
        assert [model.id for model in own.models.list()] == [BASE, *names]


def test_jobs_events_evals_and_runs_have_pages(http: httpx.Client) -> None:
    file = http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("set.jsonl", chat_lines(4))}).json()

    def made(path: str, body: dict[str, object]) -> str:
        return str(http.post(path, json=body).raise_for_status().json()["id"])

    jobs = [made("/v1/fine_tuning/jobs", {"model": BASE, "training_file": file["id"]}) for _ in range(3)]
    for job in jobs:
        http.post(f"/v1/fine_tuning/jobs/{job}/cancel").raise_for_status()
    walked = ids(http, "/v1/fine_tuning/jobs")
    assert walked == [row["id"] for row in http.get("/v1/fine_tuning/jobs").json()["data"]]
    assert set(jobs) <= set(walked)
    path = f"/v1/fine_tuning/jobs/{jobs[0]}/events"
    assert ids(http, path) == [event["id"] for event in http.get(path).json()["data"]]
    source = {"type": "file", "file_id": file["id"]}
    body = {"data_source_config": source, "testing_criteria": [{"type": "loss"}]}
    evals = [made("/v1/evals", body) for _ in range(3)]
    assert set(evals) <= set(ids(http, "/v1/evals"))
    run = {"data_source": {"type": "completions", "model": BASE}}
    runs = [made(f"/v1/evals/{evals[0]}/runs", run) for _ in range(3)]
    assert sorted(ids(http, f"/v1/evals/{evals[0]}/runs")) == sorted(runs)
