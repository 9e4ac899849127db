"""Null means "not given", and the server accepts its own messages as input."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from api_data import BASE, chat_lines
from eval_data import chats, created
from openai.types.chat import ChatCompletionMessage
from running_server import RunningServer

from reftserve.client import Client
from reftserve.client.schemas import AssistantMessage

HELLO = {"role": "user", "content": "hello"}
SHORT = {"model": BASE, "temperature": 0, "seed": 7, "max_tokens": 3}
GREEDY: Any = {"model": BASE, "temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("set.jsonl", chat_lines(12)), purpose="fine-tune").id


@pytest.fixture
def bodies(http: httpx.Client, file_id: str) -> dict[tuple[str, str], tuple[str, dict[str, Any]]]:
    eval_id = created(http, chats(4), {"type": "loss"})
    job = {"model": BASE, "training_file": file_id, "method": {"type": "reft", "reft": {"rank": 2}}}
    return {
        ("post", "/v1/chat/completions"): ("/v1/chat/completions", {**SHORT, "messages": [HELLO]}),
        ("post", "/v1/completions"): ("/v1/completions", {**SHORT, "prompt": "hello"}),
        ("post", "/v1/classify"): ("/v1/classify", {"model": BASE, "input": "hello", "labels": [" a", " b"]}),
        ("post", "/v1/fine_tuning/jobs"): ("/v1/fine_tuning/validate", job),
        ("post", "/v1/fine_tuning/validate"): ("/v1/fine_tuning/validate", job),
        ("post", "/v1/evals"): (
            "/v1/evals",
            {"data_source_config": {"file_id": file_id}, "testing_criteria": [{"type": "loss"}]},
        ),
        ("post", "/v1/evals/{eval_id}/runs"): (f"/v1/evals/{eval_id}/runs", {"data_source": {"model": BASE}}),
        ("put", "/v1/interventions/{name}/aliases/{alias}"): ("/v1/interventions/nobody/aliases/a", {"version": 1}),
    }


def json_operations(api: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    for path, operations in api["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {})
            if "application/json" in content:
                name = content["application/json"]["schema"]["$ref"].rsplit("/", 1)[-1]
                found[method, path] = api["components"]["schemas"][name]
    return found


def outcome(http: httpx.Client, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = http.request(method, path, json=body)
    return response.status_code, without_identity(response.json())


def without_identity(answer: Any) -> Any:
    if isinstance(answer, dict):
        kept = answer.keys() - {"id", "created", "created_at", "usage"}
        return {name: without_identity(answer[name]) for name in kept}
    return [without_identity(item) for item in answer] if isinstance(answer, list) else answer


NOTHING: tuple[Any, ...] = (None, [], {})


def test_a_null_or_empty_optional_field_means_not_given(
    http: httpx.Client, bodies: dict[tuple[str, str], tuple[str, dict[str, Any]]]
) -> None:
    operations = json_operations(http.get("/openapi.json").json())
    assert operations.keys() == bodies.keys()
    for operation, schema in operations.items():
        path, body = bodies[operation]
        optional = schema["properties"].keys() - set(schema.get("required", []))
        for field in sorted(optional):
            absent = {name: value for name, value in body.items() if name != field}
            expected = outcome(http, operation[0], path, absent)
            assert expected[0] in (200, 400 if field in ("input", "messages") else 404), (operation, field, expected)
            for nothing in NOTHING:
                given = outcome(http, operation[0], path, {**absent, field: nothing})
                assert given == expected, (operation, field, nothing)


def test_all_optional_fields_may_be_null_or_empty_at_once(
    http: httpx.Client, bodies: dict[tuple[str, str], tuple[str, dict[str, Any]]]
) -> None:
    for operation, schema in json_operations(http.get("/openapi.json").json()).items():
        path, body = bodies[operation]
        absent = schema["properties"].keys() - body.keys()
        expected = outcome(http, operation[0], path, body)
        for nothing in NOTHING:
            given = outcome(http, operation[0], path, {**dict.fromkeys(absent, nothing), **body})
            assert given == expected, (operation, nothing)


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": None, "functions": None, "function_call": None, "modalities": None},
        {"reasoning_effort": None, "prediction": None, "web_search_options": {}, "audio": None, "verbosity": None},
        {"tools": [], "tool_choice": "none", "parallel_tool_calls": False, "modalities": ["text"], "n": 1},
        {"tools": None, "tool_choice": "auto", "parallel_tool_calls": True, "store": False, "service_tier": "auto"},
        {"stream_options": {"include_usage": False, "include_obfuscation": True, "continuous_usage_stats": False}},
        {"logprobs": False, "echo": False, "add_generation_prompt": True, "skip_special_tokens": True},
        {"structured_outputs": {"json": None, "regex": None}, "response_format": {"type": "text"}, "logit_bias": {}},
    ],
)
def test_an_unknown_field_may_hold_an_empty_value(http: httpx.Client, fields: dict[str, Any]) -> None:
    body = {**SHORT, "messages": [HELLO]}
    answer = outcome(http, "post", "/v1/chat/completions", body)
    assert answer[0] == 200
    assert outcome(http, "post", "/v1/chat/completions", {**body, **fields}) == answer


@pytest.mark.parametrize(
    "sent_back",
    [lambda message: message, ChatCompletionMessage.model_dump, ChatCompletionMessage.to_dict],
    ids=["object", "model_dump", "to_dict"],
)
def test_openais_message_object_is_accepted_in_a_second_turn(
    client: openai.OpenAI, sent_back: Callable[[ChatCompletionMessage], Any]
) -> None:
    messages: list[Any] = [HELLO]
    first = client.chat.completions.create(messages=messages, **GREEDY).choices[0].message
    messages += [sent_back(first), {"role": "user", "content": "and then?"}]
    second = client.chat.completions.create(messages=messages, **GREEDY)
    plain = [HELLO, {"role": "assistant", "content": first.content}, messages[-1]]
    expected = client.chat.completions.create(messages=plain, **GREEDY)  # type: ignore[arg-type]
    assert second.choices[0].message.content == expected.choices[0].message.content
    assert second.usage is not None
    assert expected.usage is not None
    assert second.usage.prompt_tokens == expected.usage.prompt_tokens


def test_our_message_object_is_accepted_in_a_second_turn(server: RunningServer) -> None:
    with Client(server.url, max_retries=0) as client:
        first = client.chat([HELLO], max_tokens=6, temperature=0).choices[0].message
        assert isinstance(first, AssistantMessage)
        turns: list[Any] = [HELLO, first, {"role": "user", "content": "and then?"}]
        plain = [HELLO, {"role": "assistant", "content": first.content}, turns[-1]]
        assert (
            client.chat(turns, max_tokens=6, temperature=0).text == client.chat(plain, max_tokens=6, temperature=0).text
        )


def test_an_assistant_without_content_has_an_empty_text(http: httpx.Client) -> None:
    def answer(**content: Any) -> tuple[int, Any]:
        messages = [HELLO, {"role": "assistant", **content}, {"role": "user", "content": "well?"}]
        return outcome(http, "post", "/v1/chat/completions", {**SHORT, "messages": messages})

    assert answer(content="")[0] == 200
    assert answer(content=None) == answer() == answer(content="")
    assert answer(content=None, tool_calls=[{"id": "a"}])[1]["error"]["param"] == "messages.1.tool_calls"


def test_what_evaluation_harnesses_send_with_a_completion_is_accepted(http: httpx.Client) -> None:
    body = {**SHORT, "prompt": "hello"}
    sent = {"echo": None, "suffix": "", "best_of": 1, "logprobs": False, "stop": [], "user": None, "n": 1}
    assert outcome(http, "post", "/v1/completions", {**body, **sent}) == outcome(http, "post", "/v1/completions", body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_usage_may_be_asked_for_with_every_chunk(http: httpx.Client, path: str) -> None:
    body = {**SHORT, "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    prompt = {"messages": [HELLO]} if "chat" in path else {"prompt": "hello"}
    lines = [line for line in http.post(path, json={**body, **prompt}).text.splitlines() if line.startswith("data: {")]
    counts = [json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"] for line in lines]
    assert counts == sorted(counts)
    assert counts[-1] == 3
