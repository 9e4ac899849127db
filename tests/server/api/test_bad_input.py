"""Bad input gets an error in OpenAI's format that gives the fault, its location and the expected value."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_data import BASE, chat_lines
from published import make_artifact
from running_server import RunningServer

from reftserve.interventions import fingerprint, pack

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def nothing_logged_as_an_error(server: RunningServer) -> Iterator[None]:
    """Check that no test leaves an error in the server's log: a client's mistake is not the server's error."""
    before = server.log.stat().st_size
    yield
    logged = server.log.read_bytes()[before:].decode(errors="replace").splitlines()
    assert not [line for line in logged if " ERROR " in line or "Traceback" in line]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    found: dict[str, Any] = response.json()["error"]
    assert found.keys() == {"message", "type", "param", "code"}
    assert len(found["message"]) > 10
    return found


def chat(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO, "max_tokens": 2, **fields})


def test_an_unknown_model_offers_near_names(http: httpx.Client, trained: str) -> None:
    found = error(chat(http, model="greter"), 404)
    assert found["code"] == "model_not_found"
    assert "'greeter'" in found["message"]
    assert f"'{BASE}'" in error(chat(http, model="tiny-lama"), 404)["message"]
    assert "versions [1]" in error(chat(http, model="greeter@7"), 404)["message"]
    assert error(http.get("/v1/models/nothing"), 404)["code"] == "model_not_found"


def test_an_unknown_intervention_in_a_composition_is_named(http: httpx.Client) -> None:
    found = error(chat(http, interventions=[{"name": "nobody"}]), 404)
    assert "'nobody'" in found["message"]


def test_the_same_intervention_twice_is_an_error(http: httpx.Client, trained: str) -> None:
    twice = [{"name": "greeter"}, {"name": "greeter", "version": 1, "scale": 2}]
    assert error(chat(http, interventions=twice), 400)["code"] == "duplicate_intervention"
    assert error(chat(http, model=trained, interventions=twice[:1]), 400)["param"] == "interventions"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"tempurature": 1}, "tempurature", "unknown_field"),
        ({"interventions": [{"name": "a", "scael": 1}]}, "interventions.0.scael", "unknown_field"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": -5}, "max_tokens", "invalid_value"),
        ({"max_tokens": 10**9}, "max_tokens", "context_length_exceeded"),
        ({"temperature": -1}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"stop": ["x"] * 17}, "stop", "invalid_request"),
        ({"stop": [""]}, "stop.0", "invalid_value"),
        ({"frequency_penalty": 2.5}, "frequency_penalty", "invalid_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "invalid_value"),
        ({"logit_bias": {"300": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x", "invalid_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "invalid_value"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_request"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "invalid_request"),
        ({"priority": 101}, "priority", "invalid_value"),
        ({"timeout": 0}, "timeout", "invalid_value"),
        ({"response_format": {"type": "xml"}}, "response_format", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_field"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
            "response_format.json_schema.schema",
            "invalid_grammar",
        ),
        ({"structured_outputs": {"regex": "[a-"}}, "structured_outputs.regex", "invalid_grammar"),
        ({"structured_outputs": {"grammar": "start: )"}}, "structured_outputs.grammar", "invalid_grammar"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_schema"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs", "invalid_request"),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 1}, "min_tokens", "invalid_request"),
        ({"structured_outputs": {"regex": "a" * 70000}}, "structured_outputs.regex", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unknown_field"),
        ({"max_completion_tokens": 3}, "max_tokens", "invalid_request"),
        ({"interventions": [{"name": "a"}] * 9}, "interventions", "invalid_request"),
        ({"seed": 2**70}, "seed", "invalid_value"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_field"),
        ({"stop": 5}, "stop", "invalid_value"),
    ],
)
def test_an_invalid_field_is_named(http: httpx.Client, fields: dict[str, Any], param: str, code: str) -> None:
    found = error(chat(http, **fields), 400)
    assert (found["param"], found["code"]) == (param, code)


def test_the_error_of_invalid_json_gives_its_position(http: httpx.Client) -> None:
    headers = {"Content-Type": "application/json"}
    found = error(http.post("/v1/chat/completions", content=b'{"model": ', headers=headers), 400)
    assert found["code"] == "invalid_json"
    assert "byte 10" in found["message"]


def test_half_a_character_is_refused(http: httpx.Client) -> None:
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "\ud800"}]})
    headers = {"Content-Type": "application/json"}
    found = error(http.post("/v1/chat/completions", content=body, headers=headers), 400)
    assert found["param"] == "messages.0.content"
    assert "surrogate" in found["message"]


def test_a_body_without_the_json_content_type_is_refused_with_advice(http: httpx.Client) -> None:
    found = error(http.post("/v1/chat/completions", content=b'{"model": "x"}'), 400)
    assert "Content-Type: application/json" in found["message"]
    assert error(http.post("/v1/chat/completions", json=[1]), 400)["code"] == "invalid_json"


def test_the_error_of_a_too_long_prompt_gives_its_length_and_the_context(http: httpx.Client) -> None:
    found = error(http.post("/v1/completions", json={"model": BASE, "prompt": [5] * 600, "max_tokens": 1}), 400)
    assert found["code"] == "context_length_exceeded"
    assert "600" in found["message"]
    assert "512" in found["message"]


@pytest.mark.parametrize("prompt", [[], [[]], [10**9], ""])
def test_a_prompt_without_tokens_or_with_wrong_ones_is_refused(http: httpx.Client, prompt: Any) -> None:
    error(http.post("/v1/completions", json={"model": BASE, "prompt": prompt}), 400)


def upload(http: httpx.Client, content: bytes, purpose: str = "fine-tune") -> httpx.Response:
    return http.post("/v1/files", data={"purpose": purpose}, files={"file": ("set.jsonl", content)})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"\xff\xfe\x00", "UTF-8"),
        (chat_lines(3) + b'\n{"messages": [}', "line 4: not JSON"),
        (chat_lines(2) + b"\n[1]", "line 3: list"),
        (b'{"prompt": "x"}', "line 1: field completion"),
        (b'{"prompt": "x", "completion": ""}', "line 1: field completion"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1: field messages"),
        (
            b'{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "line 1: field messages.1.role",
        ),
        (
            b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "y"}]}',
            "line 1: field messages.0.content",
        ),
        (b'{"text": "x"}', "line 1: field messages"),
        (b'{"prompt": "\\ud800", "completion": "y"}', "line 1: field prompt"),
        (b'{"prompt": "x", "completion": "\\ud800"}', "line 1: field completion"),
        (b'{"instruction": "\\ud800", "output": "y"}', "line 1: field instruction"),
        (b'{"instruction": "x", "input": "\\ud800", "output": "y"}', "line 1: field input"),
        (b'{"instruction": "x", "output": "\\ud800"}', "line 1: field output"),
        (b"[" * 100_000, "row 1: JSON that is nested too deeply"),
        (b'{"prompt": "x", "completion": "y", "weight": 1}', "line 1: field weight"),
    ],
)
def test_a_bad_data_set_is_refused_with_line_and_field(http: httpx.Client, content: bytes, says: str) -> None:
    before = len(http.get("/v1/files").json()["data"])
    assert says in error(upload(http, content), 400)["message"]
    assert len(http.get("/v1/files").json()["data"]) == before


def test_an_unknown_purpose_is_refused(http: httpx.Client) -> None:
    assert error(upload(http, chat_lines(3), "party"), 400)["param"] == "purpose"


def test_unknown_paths_are_404_and_wrong_methods_405(http: httpx.Client) -> None:
    for path in ("/v1/files/file-x", "/v1/fine_tuning/jobs/ftjob-x", "/v1/interventions/x", "/v1/nothing"):
        error(http.get(path), 404)
    error(http.delete("/v1/chat/completions"), 405)


def job(http: httpx.Client, **fields: Any) -> httpx.Response:
    file = upload(http, chat_lines(12)).json()["id"]
    return http.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file, **fields})


def ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while True:
        found: dict[str, Any] = http.get(f"/v1/fine_tuning/jobs/{job_id}").json()
        if found["status"] in ("succeeded", "failed", "cancelled"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"training_file": "file-x"}, 404, "training_file"),
        ({"validation_file": "file-x"}, 404, "validation_file"),
        ({"suffix": "not a name"}, 400, "suffix"),
        ({"method": {"type": "dpo"}}, 400, "method.type"),
        ({"method": {"type": "reft", "reft": {"family": "magic"}}}, 400, "method.reft.family"),
        ({"method": {"type": "reft", "reft": {"layers": [99]}}}, 400, "method.reft.layers"),
        ({"method": {"type": "reft", "reft": {"positions": "x9"}}}, 400, "method.reft.positions"),
        ({"method": {"type": "reft", "reft": {"rank": 1000}}}, 400, "method.reft.rank"),
        ({"method": {"type": "reft", "reft": {"colour": 1}}}, 400, "method.reft.colour"),
        ({"method": {"type": "reft", "reft": {"hyperparameters": "best"}}}, 400, "method.reft.hyperparameters"),
        (
            {"method": {"type": "reft", "reft": {"hyperparameters": {"n_epochs": 0}}}},
            400,
            "method.reft.hyperparameters.n_epochs",
        ),
        (
            {"method": {"type": "reft", "reft": {"hyperparameters": {"max_length": 4096}}}},
            400,
            "method.reft.hyperparameters.max_length",
        ),
    ],
)
def test_an_invalid_job_is_refused_before_it_is_queued(
    http: httpx.Client, fields: dict[str, Any], status: int, param: str
) -> None:
    assert error(job(http, **fields), status)["param"] == param


def test_a_job_on_too_few_examples_fails_as_validating_them_does(http: httpx.Client) -> None:
    file = upload(http, chat_lines(3)).json()["id"]
    found = error(http.post("/v1/fine_tuning/validate", json={"model": BASE, "training_file": file}), 400)
    assert found["code"] == "too_few_examples"
    assert "10" in found["message"]
    failed = ended(http, job(http, training_file=file).json()["id"])
    assert failed["error"] == {name: found[name] for name in ("code", "message", "param")}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "word " * 400_000}, "prompt"),
        ("/v1/completions", {"prompt": ["a", "word " * 400_000]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 200_000}] * 2}, "messages"),
        ("/v1/classify", {"input": "word " * 400_000, "labels": ["a", "b"]}, "input"),
        ("/v1/classify", {"input": "a", "labels": ["a", "word " * 12_000]}, "labels"),
        (
            "/v1/classify",
            {"messages": [{"role": "user", "content": "word " * 200_000}] * 2, "labels": ["a", "b"]},
            "messages",
        ),
    ],
)
def test_a_text_longer_than_any_context_is_refused_before_it_is_encoded(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    found = error(http.post(path, json={"model": BASE, **body}), 400)
    assert (found["param"], found["code"]) == (param, "context_length_exceeded")
    assert "characters" in found["message"], "known before it is encoded"


def test_too_many_prompts_are_refused_by_their_number(http: httpx.Client) -> None:
    found = error(http.post("/v1/completions", json={"model": BASE, "prompt": ["a"] * 10_000}), 400)
    assert (found["param"], found["message"]) == ("prompt", "field 'prompt': at most 256 entries are allowed")


def test_characters_of_all_pairs_are_bounded(http: httpx.Client) -> None:
    body = {"model": BASE, "input": ["w" * 5000] * 20, "labels": [f"{number} {'w' * 500}" for number in range(1000)]}
    assert "pairs" in error(http.post("/v1/classify", json={**body, "input": ["a"] * 21}), 400)["message"]
    assert "characters" in error(http.post("/v1/classify", json=body), 400)["message"]


def test_an_intervention_cannot_be_named_like_the_base(
    http: httpx.Client, tiny_llama_folder: Path, tmp_path: Path
) -> None:
    artifact = pack(make_artifact(tmp_path / "artifact", base=fingerprint(tiny_llama_folder)))
    found = error(http.post("/v1/interventions", data={"name": BASE}, files={"file": artifact}), 400)
    assert (found["param"], found["code"]) == ("name", "invalid_name")
    assert "base" in found["message"]
    found = error(job(http, suffix=BASE), 400)
    assert (found["param"], found["code"]) == ("suffix", "invalid_name")


FILE = ("file", ("a.jsonl", chat_lines(3)))
PURPOSE = ("purpose", (None, "fine-tune"))


@pytest.mark.parametrize(
    ("path", "parts", "param", "code"),
    [
        ("/v1/files", [PURPOSE, FILE, FILE], "file", "duplicate_field"),
        ("/v1/files", [PURPOSE, PURPOSE, FILE], "purpose", "duplicate_field"),
        ("/v1/files", [PURPOSE, FILE, ("colour", (None, "red"))], "colour", "unknown_field"),
        (
            "/v1/files",
            [PURPOSE, FILE, ("expires_after[anchor]", (None, "created_at"))],
            "expires_after",
            "unknown_field",
        ),
        ("/v1/files", [PURPOSE], "file", "missing_field"),
        ("/v1/files", [FILE], "purpose", "missing_field"),
        ("/v1/files", [PURPOSE, ("file", (None, "text"))], "file", "invalid_value"),
        ("/v1/interventions", [("name", (None, "a")), FILE, FILE], "file", "duplicate_field"),
        ("/v1/interventions", [("name", (None, "a")), FILE, ("version", (None, "3"))], "version", "unknown_field"),
    ],
)
def test_a_wrong_form_is_refused_by_its_field(
    http: httpx.Client, path: str, parts: list[Any], param: str, code: str
) -> None:
    found = error(http.post(path, files=parts), 400)
    assert (found["param"], found["code"]) == (param, code)


def test_an_empty_unknown_form_field_is_not_given(http: httpx.Client) -> None:
    assert http.post("/v1/files", files=[PURPOSE, FILE, ("colour", (None, ""))]).status_code == 200
