"""Hostile JSON is refused before its parts are made, and wrong items at the first one."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

import pytest
from pydantic import ValidationError

from reftserve.client.schemas import ClassifyRequest, CompletionRequest, EvalCreate, FineTuningJobCreate, Request
from reftserve.client.schemas.generation import ChatCompletionRequest
from reftserve.server.api.json_body import parse_body
from reftserve.server.errors import InvalidRequest

BYTES = 4 << 20
BUDGET_S = 0.05
MODELS: list[type[Request]] = [
    ChatCompletionRequest,
    CompletionRequest,
    ClassifyRequest,
    FineTuningJobCreate,
    EvalCreate,
]


def fastest(action: Any, *arguments: Any) -> float:
    """Return the best of three runs in seconds of the processor: the machine has other work."""
    times = []
    for _ in range(3):
        begun = time.thread_time()
        action(*arguments)
        times.append(time.thread_time() - begun)
    return min(times)


def refused(body: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse_body(body)
    return caught.value


@pytest.mark.parametrize("item", ["{}", "[]", '""', "0", '{"a":0}', '"\\\\"', "[0]", '"\\""', "1e5", "null", "[[]]"])
def test_four_mebibytes_of_anything_cost_fifty_milliseconds(item: str) -> None:
    body = b'{"prompt":[' + b",".join([item.encode()] * (BYTES // (len(item) + 1))) + b"]}"
    assert fastest(refused, body) < BUDGET_S
    assert "at most" in refused(body).message


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("item", [{}, [], "", 0, {"a": 0}, {"role": "user"}, True, [[]], {"type": "text"}, 10**30])
def test_wrong_items_in_any_field_cost_fifty_milliseconds(model: type[Request], item: Any) -> None:
    for field in model.model_fields:
        for many in ([item] * 16_000, {str(number): item for number in range(16_000)}):
            assert fastest(lambda many=many, field=field: judged(model, {field: many})) < BUDGET_S, field


def judged(model: type[Request], body: dict[str, Any]) -> None:
    with contextlib.suppress(ValidationError):
        model.model_validate(body)


def test_an_object_of_unknown_fields_costs_fifty_milliseconds() -> None:
    body = {str(number): number for number in range(30_000)}
    assert fastest(judged, CompletionRequest, body) < BUDGET_S


@pytest.mark.parametrize(
    "value",
    ["a" * (BYTES - 50), 'say "yes", {or} [no]\\ ' * 100_000, "\U0001f600" * 400_000, "{" * 2_000_000],
    ids=["letters", "marks", "emoji", "braces"],
)
def test_a_long_text_is_one_value_whatever_it_holds(value: str) -> None:
    body = json.dumps({"prompt": value}, ensure_ascii=False).encode()
    assert parse_body(body) == {"prompt": value}
    assert fastest(parse_body, body) < 2 * BUDGET_S


def test_as_many_token_ids_as_fit_are_read_and_validated_in_time() -> None:
    body = json.dumps({"model": "a", "prompt": [[49151] * 1000] * 256}).encode()
    found = parse_body(body)
    assert fastest(parse_body, body) < 2 * BUDGET_S
    assert fastest(CompletionRequest.model_validate, found) < BUDGET_S


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"a": "\xff"}', "byte 7 is 0xff"),
        ('{"a": "ü'.encode() + b"\xc3", "byte 9 is 0xc3"),
        (b'{"a": ', "at byte 6"),
        ('{"ü": x}'.encode(), "at byte 7"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "4,300 digits"),
        (b"[" * 65 + b"]" * 65, "64 deep"),
        (b"]" * (4 << 20), "closes more"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "64 deep"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
    ],
)
def test_what_is_not_json_is_refused_with_its_place(body: bytes, says: str) -> None:
    assert says in refused(body).message
    assert refused(body).code == "invalid_json"


def test_a_field_that_is_given_twice_is_refused_by_its_name() -> None:
    found = refused(b'{"model": "a", "prompt": "x", "model": "b"}')
    assert (found.param, found.code) == ("model", "duplicate_field")
    assert refused(b'{"a": {"b": 1, "b": 1}}').param == "b"
    assert parse_body(b'{"a": {"b": 1}, "b": {"b": 2}}') == {"a": {"b": 1}, "b": {"b": 2}}


def test_a_byte_order_mark_is_read_over() -> None:
    assert parse_body(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
