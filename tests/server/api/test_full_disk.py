"""On a full disk a server answers 507 to what stores, and deletes; a full temporary folder is named."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from api_data import BASE, chat_lines
from full_disk import can_mount, fill, small_disk
from published import make_artifact
from running_server import running_server

from reftserve.interventions import fingerprint, pack

pytestmark = pytest.mark.skipif(not can_mount(), reason="mounting a small disk needs root")


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_disk(tmp_path_factory.mktemp("disks") / "data", 24) as folder:
        yield folder


@pytest.fixture(scope="module")
def temporary() -> Iterator[Path]:
    # The path of the engine's socket lies below it and must be short.
    with tempfile.TemporaryDirectory(prefix="rs-", dir="/tmp") as folder, small_disk(Path(folder) / "t", 8) as disk:
        yield disk


@pytest.fixture(scope="module")
def http(
    tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory, disk: Path, temporary: Path
) -> Iterator[httpx.Client]:
    places = ("--database-url", f"sqlite:///{disk / 'reftserve.db'}", "--blob-url", str(disk / "blobs"))
    data = tmp_path_factory.mktemp("data")
    environment = {"TMPDIR": str(temporary), "REFTSERVE_RESERVE_BYTES": "8MiB"}
    with (
        running_server(tiny_llama_folder, data, *places, worker=False, env=environment) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


@pytest.fixture
def artifact(tiny_llama_folder: Path, tmp_path: Path) -> bytes:
    return pack(make_artifact(tmp_path / "artifact", base=fingerprint(tiny_llama_folder)))


def upload(http: httpx.Client, content: bytes) -> httpx.Response:
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("set.jsonl", content)})


def publish(http: httpx.Client, artifact: bytes) -> httpx.Response:
    return http.post("/v1/interventions", data={"name": "tone"}, files={"file": ("a.zip", artifact)})


def test_with_no_byte_left_deleting_and_cancelling_succeed_and_storing_is_507(
    http: httpx.Client, disk: Path, artifact: bytes
) -> None:
    file = upload(http, chat_lines(24)).raise_for_status().json()["id"]
    publish(http, artifact).raise_for_status()
    publish(http, artifact).raise_for_status()
    body = {"model": BASE, "training_file": file, "suffix": "trained"}
    job = http.post("/v1/fine_tuning/jobs", json=body).raise_for_status().json()["id"]
    criteria = [{"type": "exact_match"}]
    source = {"type": "file", "file_id": file}
    evaluation = http.post("/v1/evals", json={"data_source_config": source, "testing_criteria": criteria})
    fill(disk)
    for stored in (
        upload(http, chat_lines(24)),
        publish(http, artifact),
        http.put("/v1/interventions/tone/aliases/stable", json={"version": 1}),
        http.post("/v1/fine_tuning/jobs", json=body),
    ):
        assert (stored.status_code, stored.json()["error"]["code"]) == (507, "storage_full"), stored.text
    for path in (
        "/v1/interventions/tone/versions/1",
        "/v1/interventions/tone",
        f"/v1/evals/{evaluation.json()['id']}",
        f"/v1/files/{file}",
    ):
        assert http.delete(path).status_code == 200, path
    assert http.post(f"/v1/fine_tuning/jobs/{job}/cancel").json()["status"] == "cancelled"
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": "once", "max_tokens": 2})
    assert answer.status_code == 200
    (disk / "filler").unlink()
    assert upload(http, chat_lines(24)).status_code == 200


@pytest.mark.parametrize("megabytes", [0.5, 6.0])
def test_a_full_temporary_folder_is_507_and_named(
    http: httpx.Client, temporary: Path, artifact: bytes, megabytes: float
) -> None:
    lines = chat_lines(24) + b"\n"
    content = lines * int(megabytes * 1e6 / len(lines))
    fill(temporary)
    try:
        for refused in (upload(http, content), publish(http, artifact)):
            error = refused.json()["error"]
            assert (refused.status_code, error["code"]) == (507, "storage_full"), error
            assert f"temporary folder {temporary}" in error["message"]
            assert "TMPDIR" in error["message"]
    finally:
        (temporary / "filler").unlink()
    assert upload(http, lines).status_code == 200
