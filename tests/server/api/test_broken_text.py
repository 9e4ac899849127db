"""Half surrogate pairs, NUL and numbers larger than a machine word are refused on input and harmless if stored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_data import BASE, chat_lines
from published import make_artifact
from running_server import RunningServer

from reftserve.interventions import fingerprint, pack
from reftserve.server.storage.database import Database
from reftserve.server.storage.tables import Eval, EvalRun, Job

HALF = "\ud800"
HUGE = 2**64
JSON = {"Content-Type": "application/json"}


def error(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    return found


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    return http.post(path, content=json.dumps(body), headers=JSON)


def uploaded(http: httpx.Client) -> str:
    files = {"file": ("set.jsonl", chat_lines(12))}
    return str(http.post("/v1/files", data={"purpose": "fine-tune"}, files=files).json()["id"])


CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
JOB = {"model": BASE, "training_file": "file-x"}
RUN = {"data_source": {"model": BASE}}
EVAL = {"data_source_config": {"file_id": "file-x"}, "testing_criteria": [{"type": "loss"}]}


@pytest.mark.parametrize("broken", [HALF, "a" + HALF + "b", "\udc00\ud800"])
@pytest.mark.parametrize(
    ("path", "body", "fields", "param"),
    [
        ("/v1/chat/completions", CHAT, lambda text: {"model": text}, "model"),
        ("/v1/chat/completions", CHAT, lambda text: {"user": text}, "user"),
        ("/v1/chat/completions", CHAT, lambda text: {"stop": ["a", text]}, "stop.1"),
        ("/v1/chat/completions", CHAT, lambda text: {"metadata": {text: "a"}}, "metadata"),
        ("/v1/chat/completions", CHAT, lambda text: {"metadata": {"a": {"b": [text]}}}, "metadata"),
        ("/v1/chat/completions", CHAT, lambda text: {"interventions": [{"name": text}]}, "interventions.0.name"),
        ("/v1/chat/completions", CHAT, lambda text: {"response_format": {"type": text}}, "response_format"),
        (
            "/v1/chat/completions",
            CHAT,
            lambda text: {"structured_outputs": {"grammar": text}},
            "structured_outputs.grammar",
        ),
        ("/v1/classify", {"model": BASE, "input": "a"}, lambda text: {"labels": ["a", text]}, "labels.1"),
        ("/v1/fine_tuning/jobs", JOB, lambda text: {"training_file": text}, "training_file"),
        ("/v1/fine_tuning/jobs", JOB, lambda text: {"suffix": text}, "suffix"),
        ("/v1/fine_tuning/jobs", JOB, lambda text: {"metadata": {"a": text}}, "metadata.a"),
        ("/v1/evals", EVAL, lambda text: {"name": text}, "name"),
        (
            "/v1/evals",
            EVAL,
            lambda text: {"testing_criteria": [{"type": "contains", "text": text}]},
            "testing_criteria.0.text",
        ),
        ("/v1/evals/eval_x/runs", RUN, lambda text: {"metadata": {"a": text}}, "metadata.a"),
    ],
)
def test_half_a_surrogate_pair_is_refused_with_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], fields: Any, param: str, broken: str
) -> None:
    assert error(post(http, path, {**body, **fields(broken)}))["param"] == param


def test_a_field_name_with_half_a_pair_is_refused(http: httpx.Client) -> None:
    assert error(post(http, "/v1/chat/completions", {**CHAT, HALF: 1}))["code"] == "invalid_value"
    assert error(post(http, "/v1/chat/completions", {**CHAT, "messages": [{"role": "user", HALF: "a"}]}))


def test_two_matching_halves_are_a_character(http: httpx.Client) -> None:
    content = json.dumps({**CHAT, "user": "\U0001f600"})
    assert "\\ud83d\\ude00" in content
    assert http.post("/v1/chat/completions", content=content, headers=JSON).status_code == 200


def operations(http: httpx.Client) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation.get("parameters", [])


def test_nul_in_a_path_or_query_parameter_never_reaches_the_database(http: httpx.Client) -> None:
    tried = 0
    for method, path, parameters in operations(http):
        for parameter in parameters:
            name = parameter["name"]
            if parameter["in"] == "path":
                found = http.request(method, path.replace(f"{{{name}}}", "a%00b").replace("{", "").replace("}", ""))
            elif parameter["in"] == "query":
                found = http.request(method, path.replace("{", "").replace("}", ""), params={name: "a\0b"})
            else:
                continue
            assert error(found)["param"] == name, (method, path, name)
            tried += 1
    assert tried > 30


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "a\0b"}, "model"),
        ("/v1/chat/completions", {**CHAT, "model": "a" * 257}, "model"),
        ("/v1/chat/completions", {**CHAT, "interventions": [{"name": "a\0b"}]}, "interventions.0.name"),
        ("/v1/fine_tuning/jobs", {**JOB, "training_file": "a\0b"}, "training_file"),
        ("/v1/fine_tuning/jobs", {**JOB, "validation_file": "a\0b"}, "validation_file"),
        ("/v1/fine_tuning/jobs", {**JOB, "suffix": "a\0b"}, "suffix"),
        ("/v1/evals", {**EVAL, "name": "a\0b"}, "name"),
        ("/v1/evals", {**EVAL, "data_source_config": {"file_id": "a\0b"}}, "data_source_config.file_id"),
        ("/v1/evals/eval_x/runs", {**RUN, "name": "a\0b"}, "name"),
    ],
)
def test_nul_in_a_name_or_an_id_is_refused_with_the_field(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    if param == "suffix":
        body = {**body, "training_file": uploaded(http)}
    assert error(post(http, path, body))["param"] == param


@pytest.mark.parametrize(
    ("charset", "name"),
    [("utf-8", b"a\0b.jsonl"), ("raw_unicode_escape", rb"\ud800.jsonl")],
    ids=["NUL", "half a pair, by a charset of the client's"],
)
def test_a_file_name_must_be_valid_text(http: httpx.Client, charset: str, name: bytes) -> None:
    parts = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    parts += b'--x\r\nContent-Disposition: form-data; name="file"; filename="' + name + b'"\r\n\r\n' + chat_lines(3)
    headers = {"Content-Type": f"multipart/form-data; boundary=x; charset={charset}"}
    assert error(http.post("/v1/files", content=parts + b"\r\n--x--\r\n", headers=headers))["param"] == "file"


def test_a_version_of_thousands_of_digits_is_not_found(
    http: httpx.Client, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    artifact = pack(make_artifact(tmp_path / "artifact", base=fingerprint(tiny_llama_folder)))
    assert http.post("/v1/interventions", data={"name": "digits"}, files={"file": artifact}).status_code == 201
    for path in ("/v1/models/digits@", "/v1/models/digits@@1", "/v1/models/@1", "/v1/interventions/digits/versions/@"):
        assert error(http.get(path), 404)
        assert error(http.delete(path), 404)
    for model in ("digits@", "digits@@1", "@1", f"digits@{2**31}", f"digits@{10**17}"):
        assert error(post(http, "/v1/chat/completions", {**CHAT, "model": model}), 404)
    assert http.get("/v1/models/digits@1").status_code == 200
    many = "9" * 5000
    for path in (f"/v1/models/digits@{many}", f"/v1/interventions/digits/versions/{many}"):
        assert error(http.get(path), 404)["code"] == "model_not_found"
        assert error(http.delete(path), 404)["code"] == "model_not_found"
    assert error(http.get("/v1/interventions/digits/versions/\N{ARABIC-INDIC DIGIT ONE}/content"), 404)
    assert error(post(http, "/v1/chat/completions", {**CHAT, "model": f"digits@{many[:200]}"}), 404)
    body = {**CHAT, "interventions": [{"name": "digits", "version": many}]}
    assert error(post(http, "/v1/chat/completions", body))["param"] == "interventions.0.version"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {"top_k": HUGE},
        {"max_tokens": HUGE},
        {"min_tokens": HUGE},
        {"seed": HUGE},
        {"priority": HUGE},
        {"n": HUGE},
        {"logit_bias": {str(HUGE): 1}},
        {"interventions": [{"name": "greeter", "version": HUGE}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_number_larger_than_a_machine_word_is_refused(
    http: httpx.Client, fields: dict[str, Any], stream: bool
) -> None:
    found = http.post("/v1/chat/completions", json={**CHAT, **fields, "stream": stream})
    assert found.status_code in (400, 404), found.text


def test_the_largest_top_k_is_accepted(http: httpx.Client) -> None:
    assert http.post("/v1/chat/completions", json={**CHAT, "top_k": 2**31 - 1}).status_code == 200


def test_a_body_with_too_deep_nesting_or_too_long_a_number_is_refused(http: httpx.Client) -> None:
    for value in ("[" * 100_000 + "]" * 100_000, "9" * 5000):
        content = json.dumps({**CHAT, "metadata": {"a": "VALUE"}}).replace('"VALUE"', value)
        found = http.post("/v1/chat/completions", content=content, headers=JSON)
        assert found.status_code in (200, 400), found.text


def test_rows_of_older_versions_break_no_list(server: RunningServer, http: httpx.Client) -> None:
    broken = {"a" + HALF: HALF + "b"}
    file_id = uploaded(http)
    job_id = post(http, "/v1/fine_tuning/jobs", {**JOB, "training_file": file_id}).json()["id"]
    http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel")
    eval_id = post(http, "/v1/evals", {**EVAL, "data_source_config": {"file_id": file_id}}).json()["id"]
    run_id = post(http, f"/v1/evals/{eval_id}/runs", RUN).json()["id"]
    database = Database(f"sqlite:///{server.data / 'reftserve.db'}")
    with database.session() as session:
        session.get_one(Job, job_id).job_metadata = broken
        session.get_one(Eval, eval_id).eval_metadata = broken
        session.get_one(Eval, eval_id).criteria = [{"type": "contains", "name": HALF, "text": HALF}]
        session.get_one(EvalRun, run_id).run_metadata = broken
    database.close()
    read = {"a\ufffd": "\ufffdb"}
    assert http.get(f"/v1/fine_tuning/jobs/{job_id}").json()["metadata"] == read
    assert read in [job["metadata"] for job in http.get("/v1/fine_tuning/jobs?limit=1000").json()["data"]]
    found = http.get(f"/v1/evals/{eval_id}").json()
    assert (found["metadata"], found["testing_criteria"][0]["text"]) == (read, "\ufffd")
    assert found["runs"][0]["metadata"] == http.get(f"/v1/evals/{eval_id}/runs/{run_id}").json()["metadata"] == read
    assert read in [listed["metadata"] for listed in http.get("/v1/evals?limit=100").json()["data"]]
    http.delete(f"/v1/evals/{eval_id}")
