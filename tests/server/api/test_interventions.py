"""/v1/interventions: versions in use, refused uploads, aliases in generation."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import httpx
import pytest
from api_data import BASE
from published import make_artifact
from running_server import RunningServer

from reftserve.interventions import fingerprint, pack

LONG = {"prompt": "once", "max_tokens": 400, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def artifact(tiny_llama_folder: Path, tmp_path: Path) -> bytes:
    return pack(make_artifact(tmp_path / "artifact", base=fingerprint(tiny_llama_folder)))


def upload(http: httpx.Client, name: str, data: bytes) -> httpx.Response:
    return http.post("/v1/interventions", data={"name": name}, files={"file": ("a.zip", data)})


def error(response: httpx.Response, status: int) -> dict[str, str]:
    assert response.status_code == status, response.text
    found: dict[str, str] = response.json()["error"]
    return found


def test_a_version_in_use_is_deleted_only_by_force_and_its_stream_completes(
    server: RunningServer, http: httpx.Client, artifact: bytes
) -> None:
    assert upload(http, "held", artifact).status_code == 201
    body = {**LONG, "model": "held"}
    expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**body, "stream": True}, timeout=60) as stream:
        lines = stream.iter_lines()
        next(line for line in lines if line.startswith("data: "))
        refused = error(http.delete("/v1/interventions/held"), 409)
        assert refused["code"] == "intervention_in_use"
        assert "running request" in refused["message"]
        assert http.delete("/v1/interventions/held", params={"force": True}).json()["deleted"]
        assert error(http.post("/v1/completions", json=body), 404)["code"] == "model_not_found"
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert '"finish_reason":"length"' in "".join(rest)
    assert upload(http, "held", artifact).json()["version"] == 2
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected


def test_an_intervention_for_another_base_is_refused_with_the_difference(
    http: httpx.Client, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    base = fingerprint(tiny_llama_folder).model_copy(update={"weights_hash": "elsewhere"})
    found = error(upload(http, "foreign", pack(make_artifact(tmp_path / "foreign", base=base))), 400)
    assert found["code"] == "fingerprint_mismatch"
    assert "weights_hash is 'elsewhere'" in found["message"]
    assert http.get("/v1/interventions/foreign").status_code == 404


def test_a_file_that_is_not_an_artifact_is_refused(http: httpx.Client, artifact: bytes) -> None:
    assert error(upload(http, "bad", b"nothing"), 400)["code"] == "invalid_artifact"
    assert error(upload(http, "a/b", artifact), 400)["code"] == "invalid_name"
    buffer = io.BytesIO(artifact)
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("edits.pkl", b"never read")
    assert "edits.pkl" in error(upload(http, "bad", buffer.getvalue()), 400)["message"]


def test_an_alias_moves_between_versions_and_can_be_named_in_generation(http: httpx.Client, artifact: bytes) -> None:
    for _ in range(2):
        upload(http, "moving", artifact)
    path = "/v1/interventions/moving/aliases/stable"
    assert http.put(path, json={"version": 1}).json()["aliases"] == {"latest": 2, "stable": 1}
    body = {"model": "moving@stable", "prompt": "x", "max_tokens": 3, "temperature": 0}
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.get("/v1/models/moving@stable").json()["parent"] == BASE
    assert error(http.put(path, json={"version": 7}), 404)["code"] == "model_not_found"
    assert error(http.put("/v1/interventions/moving/aliases/12", json={"version": 1}), 400)["code"] == "invalid_name"
    assert "stable" not in http.delete(path).json()["aliases"]
    assert error(http.post("/v1/completions", json=body), 404)
