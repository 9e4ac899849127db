"""Whatever is sent, the server gives an answer that its description has, and neither it nor the engine restarts."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_data import BASE, chat_lines
from eval_data import chats, created
from fastapi.routing import APIRoute
from hostile_calls import HostileCall, Operation, hostile_calls, operations
from hypothesis import event, given
from hypothesis import strategies as st
from published import make_artifact
from pydantic import TypeAdapter
from running_server import RunningServer, running_server

from reftserve.client.schemas import ErrorBody
from reftserve.interventions import fingerprint, pack
from reftserve.server.app import ROUTERS

CALLS = 7  # in an example: 1,050 in `make test`, 21,000 in `make test-thorough`
ALLOWED = {503, 504, 507}
SHORT = {"model": BASE, "max_tokens": 3, "timeout": 5}


@pytest.fixture(scope="module")
def fuzzed(tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    # Without a worker: it would train whatever job the calls create.
    with running_server(tiny_llama_folder, tmp_path_factory.mktemp("fuzzed"), worker=False) as running:
        yield running


@pytest.fixture(scope="module")
def http(fuzzed: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fuzzed.url, timeout=60) as client:
        yield client


class Target:
    """The server under test: its operations, the ids that exist, and the type of each operation's answer."""

    def __init__(self, http: httpx.Client, artifact: bytes) -> None:
        form = {"purpose": "fine-tune"}
        file = http.post("/v1/files", data=form, files={"file": ("set.jsonl", chat_lines(12))}).json()["id"]
        assert http.post("/v1/interventions", data={"name": "edit"}, files={"file": artifact}).status_code == 201
        eval_id = created(http, chats(4), {"type": "loss"})
        job = {"model": BASE, "training_file": file, "method": {"type": "reft", "reft": {"rank": 2}}, "suffix": "a"}
        job_id = http.post("/v1/fine_tuning/jobs", json=job).json()["id"]
        message = {"role": "user", "content": [{"type": "text", "text": "hello"}]}
        use = [{"name": "edit", "version": 1, "scale": 0.5}]
        criteria = [{"type": "accuracy", "labels": ["a", "b"]}, {"type": "contains", "text": "a"}]
        bodies: dict[tuple[str, str], dict[str, Any]] = {
            ("post", "/v1/chat/completions"): {**SHORT, "messages": [message], "interventions": use, "stop": ["a"]},
            ("post", "/v1/completions"): {**SHORT, "prompt": [[1, 2], [3]], "logit_bias": {"5": 1}},
            ("post", "/v1/classify"): {"model": BASE, "messages": [[message]], "labels": ["a", "b"], "timeout": 5},
            ("post", "/v1/fine_tuning/jobs"): {**job, "metadata": {"a": "b"}},
            ("post", "/v1/fine_tuning/validate"): {**job, "hyperparameters": {"n_epochs": 1}},
            ("post", "/v1/evals"): {"data_source_config": {"file_id": file}, "testing_criteria": criteria},
            ("post", "/v1/evals/{eval_id}/runs"): {"data_source": {"model": BASE, "interventions": use}},
            ("put", "/v1/interventions/{name}/aliases/{alias}"): {"version": 1},
        }
        self.ids = ["edit", "edit@1", "1", file, eval_id, job_id, BASE]
        self.operations: list[Operation] = operations(http.get("/openapi.json").json(), bodies)
        routes = [route for router in ROUTERS for route in router.router.routes if isinstance(route, APIRoute)]
        self.types = {
            (method.lower(), route.path): TypeAdapter(route.response_model)
            for route in routes
            for method in route.methods
            if route.response_model is not None
        }


@pytest.fixture(scope="module")
def target(http: httpx.Client, tiny_llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Target:
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    return Target(http, pack(make_artifact(folder, base=fingerprint(tiny_llama_folder))))


def send(http: httpx.Client, call: HostileCall) -> httpx.Response:
    # Hypothesis draws what no URL can hold; a client sends it as U+FFFD or percent-encoded.
    path = "/".join(urllib.parse.quote(part.encode("utf-8", "surrogatepass")) for part in call.path.split("/"))
    query = urllib.parse.urlencode(
        {name: value.encode("utf-8", "surrogatepass") for name, value in call.query.items() if name != "stream"}
    )
    headers = {"Content-Type": "application/json"} if call.content is not None else {}
    url = f"{path[:8000]}?{query[:8000]}"
    return http.request(call.operation.method, url, content=call.content, headers=headers)


def check(target: Target, call: HostileCall, answer: httpx.Response) -> None:
    status, operation = answer.status_code, call.operation
    event(f"{status}")  # --hypothesis-show-statistics
    assert status < 500 or status in ALLOWED, (call, answer.text)
    # A hostile path may be another operation's.
    assert status in operation.statuses | {404, 405}, (call, answer.text)
    if status >= 400 and operation.path != "/ready":
        error = ErrorBody.model_validate(answer.json()).error
        assert len(error.message) < 3000, call
        assert error.code != "engine_died", call
    elif "application/json" in answer.headers["content-type"] and operation.path.count("{") == 0:
        kind = target.types.get((operation.method, operation.path))
        if kind is not None:
            kind.validate_python(answer.json())


@given(data=st.data())
def test_no_call_is_answered_outside_of_the_description(
    fuzzed: RunningServer, http: httpx.Client, target: Target, data: st.DataObject
) -> None:
    engine = fuzzed.child("engine.process").pid
    for _ in range(CALLS):
        call = data.draw(hostile_calls(target.operations, target.ids))
        check(target, call, send(http, call))
    assert fuzzed.child("engine.process").pid == engine
    assert http.get("/health").status_code == 200


def test_nothing_that_was_sent_is_an_error_in_the_log(fuzzed: RunningServer, http: httpx.Client) -> None:
    logged = fuzzed.log.read_text(errors="replace").splitlines()
    assert not [line for line in logged if " ERROR " in line or "Traceback" in line]
