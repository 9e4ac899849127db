"""Sampling fields through OpenAI's client: log-probabilities, penalties, formats, priority, timeouts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import httpx
import openai
import pydantic
import pytest
from api_data import BASE

HELLO: Any = [{"role": "user", "content": "hello"}]


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    age: int = pydantic.Field(ge=0, le=120)


def complete(client: openai.OpenAI, prompt: Any = "the quick brown", **fields: Any) -> Any:
    return client.completions.create(
        model=BASE, prompt=prompt, **{"temperature": 0, "max_tokens": 6, "extra_body": {"ignore_eos": True}, **fields}
    )


def test_chat_log_probabilities_name_the_tokens_that_make_the_text(client: openai.OpenAI) -> None:
    fields: Any = {"model": BASE, "messages": HELLO, "temperature": 0, "max_tokens": 8, "logprobs": True}
    whole = client.chat.completions.create(**fields, top_logprobs=3).choices[0]
    assert whole.logprobs is not None
    assert whole.logprobs.content
    text = b"".join(bytes(entry.bytes or []) for entry in whole.logprobs.content).decode(errors="replace")
    assert text == whole.message.content
    for entry in whole.logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token  # greedy
        assert len(entry.top_logprobs) == 3
    streamed = [
        entry
        for chunk in client.chat.completions.create(**fields, top_logprobs=3, stream=True)
        for entry in (chunk.choices[0].logprobs.content if chunk.choices[0].logprobs else None) or []
    ]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.logprobs.content]


def test_completion_log_probabilities_have_offsets_into_the_text(client: openai.OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == 6
    assert found.text_offset[0] == 0
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values())


def test_echo_with_log_probabilities_scores_the_prompt(client: openai.OpenAI) -> None:
    prompt = "the lazy dog jumps over the quick fox"
    scored = complete(client, prompt, echo=True, logprobs=1, max_tokens=0)
    found = scored.choices[0].logprobs
    assert scored.choices[0].text == prompt == "".join(found.tokens)
    assert scored.usage.completion_tokens == 0
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    assert all(logprob <= 0 for logprob in found.token_logprobs[1:])
    assert [prompt[start:][: len(token)] for start, token in zip(found.text_offset, found.tokens, strict=True)] == (
        found.tokens
    )
    longer = complete(client, prompt, echo=True, logprobs=1, max_tokens=3).choices[0]
    assert longer.logprobs.token_logprobs[1 : len(found.tokens)] == pytest.approx(found.token_logprobs[1:], abs=1e-3)
    assert len(longer.logprobs.tokens) == len(found.tokens) + 3
    chunks = [chunk.choices[0] for chunk in complete(client, prompt, echo=True, logprobs=1, max_tokens=3, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == longer.text
    assert [t for chunk in chunks if chunk.logprobs for t in chunk.logprobs.tokens] == longer.logprobs.tokens


def test_the_greedy_answer_has_the_highest_scored_prompt(client: openai.OpenAI) -> None:
    """Evaluation harnesses need this: the greedy continuation agrees with the scores."""
    prompt = [40, 41, 42, 43]
    greedy = complete(client, prompt, max_tokens=1, logprobs=5).choices[0].logprobs
    best = greedy.token_logprobs[0]
    for token in (50, 60, 70):
        scored = complete(client, [*prompt, token], echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
        assert scored.token_logprobs[-1] <= best + 1e-4


def test_a_bias_forces_and_forbids_tokens(client: openai.OpenAI) -> None:
    forced = complete(client, logit_bias={"50": 100}, logprobs=0, max_tokens=3).choices[0].logprobs.tokens
    assert len(set(forced)) == 1
    free = complete(client, [40, 41], max_tokens=1).choices[0].text
    ids = {str(i): -100 for i in range(300) if i not in (70, 71)}
    assert free != complete(client, [40, 41], max_tokens=1, logit_bias=ids).choices[0].text


@pytest.mark.parametrize(
    "penalty", [{"frequency_penalty": 2}, {"extra_body": {"repetition_penalty": 9.0, "ignore_eos": True}}]
)
def test_penalties_end_repetitions(client: openai.OpenAI, penalty: dict[str, Any]) -> None:
    # A bias makes the model repeat itself; a penalty that grows with each repetition ends that.
    bias = {"50": 8}
    repeated = complete(client, logit_bias=bias, max_tokens=20, logprobs=0).choices[0].logprobs.tokens
    penalised = complete(client, logit_bias=bias, max_tokens=20, logprobs=0, **penalty).choices[0].logprobs.tokens
    assert len(set(penalised)) > len(set(repeated))


def test_min_tokens_delays_every_end(client: openai.OpenAI) -> None:
    fields: Any = {"logit_bias": {"2": 100}, "max_tokens": 9}
    assert complete(client, extra_body={}, **fields).usage.completion_tokens == 1
    held = complete(client, extra_body={"min_tokens": 5}, **fields)
    assert held.usage.completion_tokens == 6
    assert held.choices[0].finish_reason == "stop"


def test_the_client_parses_an_answer_into_its_own_type(client: openai.OpenAI) -> None:
    for seed in range(3):
        parsed = client.chat.completions.parse(
            model=BASE, messages=HELLO, response_format=Person, temperature=1, seed=seed, max_tokens=120
        )
        assert parsed.choices[0].finish_reason == "stop"
        assert isinstance(parsed.choices[0].message.parsed, Person)


def test_an_answer_can_be_any_json_object(client: openai.OpenAI) -> None:
    biased: Any = {"temperature": 1.0, "max_tokens": 300, "response_format": {"type": "json_object"}}
    answers = client.chat.completions.create(model=BASE, messages=HELLO, n=8, seed=1, **biased).choices
    ended = [answer for answer in answers if answer.finish_reason == "stop"]
    assert all(isinstance(json.loads(answer.message.content or ""), dict) for answer in ended)
    assert all((answer.message.content or "").startswith("{") for answer in answers)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"regex": r"[0-9]{4}-[0-9]{2}"}, r"[0-9]{4}-[0-9]{2}"),
        ({"choice": ["yes", 'say "no"']}, r'yes|say "no"'),
        ({"grammar": 'start: "<" /[a-z]{1,5}/ ">"'}, r"<[a-z]{1,5}>"),
        ({"json": {"enum": [1, "two"]}}, r'1|"two"'),
        ({"json": '{"type": "boolean"}'}, r"true|false"),
    ],
)
def test_an_answer_has_the_requested_format(client: openai.OpenAI, wanted: dict[str, Any], expected: str) -> None:
    for stream in (False, True):
        answer = client.chat.completions.create(
            model=BASE, messages=HELLO, stream=stream, max_tokens=60, extra_body={"structured_outputs": wanted}
        )
        text = (
            "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            if stream
            else answer.choices[0].message.content
        )
        assert re.fullmatch(expected, text)


def test_a_request_that_takes_too_long_ends_with_a_timeout_error(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": "a", "max_tokens": 500, "ignore_eos": True, "timeout": 0.02}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.json()["error"]["param"] == "timeout"
    assert http.post("/v1/completions", json={**body, "max_tokens": 2, "timeout": 60}).status_code == 200


def test_scoring_without_generation_needs_echo(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": BASE, "prompt": "a", "max_tokens": 0})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "max_tokens"


def test_log_probabilities_are_finite_even_for_impossible_tokens(client: openai.OpenAI) -> None:
    found = complete(client, logprobs=20, logit_bias={"60": 100}, max_tokens=2).choices[0].logprobs
    assert all(math.isfinite(value) for top in found.top_logprobs for value in top.values())
