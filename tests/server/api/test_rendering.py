"""Training and serving render alike: each turn's prompt equals that of /v1/chat/completions, token for token."""

from __future__ import annotations

from typing import Any

import httpx
from api_data import BASE
from tiny_models import tiny_base_tokenizer

from reftserve.server.datasets import SourceLocation, encode
from reftserve.server.datasets.rows import row_examples

TURNS = [("system", "be brief"), ("user", "is the fox lazy?"), ("assistant", "no"), ("user", "and\nthe dog?")]
TURNS += [("assistant", "yes"), ("developer", "be polite"), ("user", "why?"), ("assistant", "it is asleep")]


def answer(http: httpx.Client, path: str, **fields: Any) -> tuple[int, str]:
    body = {"model": BASE, "max_tokens": 8, "temperature": 0, "logprobs": True if "chat" in path else 1, **fields}
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    found = response.json()
    (choice,) = found["choices"]
    return found["usage"]["prompt_tokens"], choice["message"]["content"] if "chat" in path else choice["text"]


def test_each_turns_prompt_is_the_one_that_chat_completions_renders(http: httpx.Client) -> None:
    messages = [{"role": role, "content": text} for role, text in TURNS]
    turns = [index for index, (role, _) in enumerate(TURNS) if role == "assistant"]
    examples = [
        encode(tiny_base_tokenizer(), example)
        for example in row_examples({"messages": messages}, SourceLocation("row", 1))
    ]
    for index, example in zip(turns, examples, strict=True):
        served = answer(http, "/v1/chat/completions", messages=messages[:index])
        assert served == answer(http, "/v1/completions", prompt=list(example.prompt_ids))
        assert served[0] == len(example.prompt_ids)
